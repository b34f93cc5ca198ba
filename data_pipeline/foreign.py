"""Indexes of tars where they lie, on disk or behind URLs, so that training reads them as it reads shards built here.

Of each tar the headers are read, the texts, and of pictures as many bytes as state their size. No picture is read
whole: its sha256 is unknown, and whether it decodes shows when it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from xxhash import xxh3_64_intdigest

from data_pipeline import parquet, remote
from data_pipeline.errors import InputError
from data_pipeline.headers import Ranges, Refused, size_by_ranges
from data_pipeline.index import LOCATION, PROMPTS, SUFFIX, sample_id, with_scores
from data_pipeline.progress import progress
from data_pipeline.records import EncodedImage, Record, Rejected, slug
from data_pipeline.shards import about, atomic_write
from data_pipeline.sources.folder import extension_of
from data_pipeline.sources.layouts import Columns, columns_of
from data_pipeline.sources.webdataset import MAX_TEXT, TEXTS, json_member, own_record, sample_draft, storable
from data_pipeline.steps.decode import Decode
from data_pipeline.steps.quality import Quality
from data_pipeline.tars import Defect, Sample, TarMember, samples, scan

VERSION = "3"  # of what an index holds: another one is made again
LEDGER = ".ledger.json"
THREADS = 16  # tars at a time: reading by ranges is waiting
MAX_TARS = 1_000_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
COLUMNS = [column for column in Quality().columns() if column.name in ("min_side", "aspect", "words")]
LIMITS = Decode()

Found = (
    bytes | tuple[int, int] | Refused
)  # of a member: its text, its picture's width and height, or why it has neither
Row = dict[str, Any]


def index(
    tars: Sequence[str], output: Path, layout: str = "text_image", columns: Mapping[str, str | list[str]] | None = None
) -> str:
    """Writes an index and a ledger of what is wrong for each tar into `output`; returns the counts as text.

    A tar that was indexed before and has not changed is not read again.

    Args:
        tars: tars, folders of tars, or URLs of tars; `{0000..0099}` stands for all numbers of a range.
        output: a folder of its own for the indexes.
        layout, columns: what a sample by others is, as of data_pipeline.sources.WebDataset.
    """
    reader = partial(index_tar, Path(output), layout, dict(columns or {}))
    columns_of(layout, columns or {})  # refused before anything is read
    locations, output = expanded(tars), Path(output)
    if output.exists() and (not output.is_dir() or any(output.glob("*.tar"))):
        raise InputError(f"{output} is a file or holds shards; choose a new folder for the indexes")
    output.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd headers: our own limits decide
        return summary(list(progress(pool.map(reader, locations), len(locations), "tars")), output)


def expanded(tars: Iterable[str]) -> list[str]:
    """Absolute paths and URLs of all tars named, each once, in the order given."""
    found: list[str] = []
    for name in tars:
        for location in [name] if not remote.is_url(name) and Path(name).exists() else numbered(name):
            path = Path(location)
            if remote.is_url(location):
                remote.filesystem(location)
                found.append(location)
            elif path.is_dir():
                inside = [str(tar) for tar in sorted(path.resolve().rglob("*.tar"))]
                if not inside:
                    raise InputError(f"{path} holds no *.tar; give tars, folders of tars or URLs")
                found += inside
            elif path.is_file():
                found.append(str(path.resolve()))
            else:
                raise InputError(f"there is no tar or folder at {location!r}; give tars, folders of tars or URLs")
    if not found:
        raise InputError("no tar was given; give tars, folders of tars or URLs")
    if odd := [location for location in found if not location.isprintable()]:
        raise InputError(f"the name {odd[0]!r} has characters that cannot be stored; rename it")
    return list(dict.fromkeys(found))


def numbered(name: str) -> list[str]:
    """The names that `{0000..0003}` stands for, with as many digits as the first number has."""
    names = [name]
    while match := RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or len(names) * (last - first + 1) > MAX_TARS:
            raise InputError(f"{name}: the range {match[0]} is empty or too long; expected at most {MAX_TARS:,} tars")
        numbers = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
        names = [RANGE.sub(number, text, count=1) for text in names for number in numbers]
    return names


def index_tar(output: Path, layout: str, columns: dict[str, str | list[str]], location: str) -> dict[str, Any]:
    """Indexes one tar, unless it is known; returns its ledger, with `known` set if it is."""
    size, stamp = remote.stat(location) if remote.is_url(location) else stat(Path(location))
    source = {"version": VERSION, "location": location, "bytes": str(size), "stamp": stamp}
    source |= {"layout": layout, "columns": json.dumps(columns, sort_keys=True)}
    name = f"{slug(Path(location).stem)[:40]}-{hashlib.sha256(location.encode()).hexdigest()[:12]}".lstrip("-")
    path, ledger_path = output / f"{name}{SUFFIX}", output / f"{name}{LEDGER}"
    if path.is_file() and (ledger := read_ledger(ledger_path)).get("source") == source:
        return {**ledger, "known": True}
    rows: list[Row] = []
    rejected: list[Rejected] = []
    left_out: Counter[str] = Counter()
    with closing(Ranges(fetcher(location), size)) as file:
        for item in read_tar(file, size, location, columns_of(layout, columns), left_out):
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                rows += item
        taken = file.taken
    kinds = {row["key"]: row["kind"] for row in rows}
    ledger = {
        "source": source,
        "content": "pictures were not read: their sha256 is unknown",
        "bytes_read": taken,
        "kept": dict(sorted(Counter(kinds.values()).items())),
        "rejected": dict(sorted(Counter(item.reason for item in rejected).items())),
        "members_left_out": dict(sorted(left_out.items())),
        "ledger": [{"key": item.key, "reason": item.reason, "detail": item.detail} for item in rejected],
    }
    schema = with_scores(COLUMNS).with_metadata({LOCATION if k == "location" else k: v for k, v in source.items()})
    atomic_write(path, parquet.encoded(pa.Table.from_pylist(rows, schema=schema)))
    atomic_write(ledger_path, json.dumps(ledger, indent=1, ensure_ascii=False).encode())  # last: it marks the end
    return ledger


def stat(path: Path) -> tuple[int, str]:
    """Size of a local tar and when it was changed."""
    facts = path.stat()
    return facts.st_size, str(facts.st_mtime_ns)


def read_ledger(path: Path) -> dict[str, Any]:
    """A ledger written before; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fetcher(location: str) -> Callable[[int, int], bytes]:
    """What reads a range of a tar."""
    if remote.is_url(location):
        return partial(remote.read_range, location)
    try:
        file = open(location, "rb", buffering=0)  # noqa: SIM115 closed when its last reader is gone
    except OSError as error:
        raise InputError(f"cannot read {location}: {error.strerror}; check the path and its permissions") from error
    return lambda start, end: os.pread(file.fileno(), end - start, start)


def read_tar(
    file: Ranges, size: int, location: str, columns: Columns, left_out: Counter[str]
) -> Iterator[list[Row] | Rejected]:
    """The rows of each record of a tar, and everything that makes none; counts members that no record has use for."""
    found: dict[int, Found] = {}
    texts = {*TEXTS, "json", *(name for names in columns.named.values() for name in names)}
    for item in samples(looked_into(scan(cast(BinaryIO, file), size), file, texts, found)):
        if isinstance(item, Defect):
            yield Rejected(f"byte-{item.offset}", item.reason, item.detail)
            continue
        try:
            record, fields = described(item, found, location, columns)
        except Refused as refused:
            yield Rejected(item.key, refused.reason, f"sample {item.key!r}: {refused.detail}")
        except KeyError as error:
            yield Rejected(item.key, "bad_sample", f"sample {item.key!r}: it has no {error.args[0]}")
        except (ValueError, TypeError, RecursionError) as error:
            yield Rejected(item.key, "bad_sample", f"sample {item.key!r}: {error}")
        else:
            left_out.update(item.members.keys() - fields.values())
            yield list(rows_of(record, item, fields, found, location))


def looked_into(
    items: Iterable[TarMember | Defect], file: Ranges, texts: Container[str], found: dict[int, Found]
) -> Iterator[TarMember | Defect]:
    """The items as they pass; what their bytes say is put into `found` by offset while those bytes are at hand."""
    for item in items:
        rest = item.name.rpartition("/")[2].partition(".")[2] if isinstance(item, TarMember) else ""
        if isinstance(item, TarMember) and (extension_of(rest) or rest in texts):
            try:
                found[item.offset] = text_of(file, item) if not extension_of(rest) else picture_of(file, item)
            except Refused as refused:
                found[item.offset] = refused
        yield item


def text_of(file: Ranges, member: TarMember) -> bytes:
    """A text member's bytes."""
    if member.size > MAX_TEXT:
        raise Refused("text_too_long", f"{member.name} has {member.size} bytes, at most {MAX_TEXT}")
    file.seek(member.offset)
    return file.read(member.size)


def picture_of(file: Ranges, member: TarMember) -> tuple[int, int]:
    """Width and height of a picture member, within the limits of building."""
    size = size_by_ranges(file, member.offset, member.size)
    if refused := LIMITS.refused_size(*size):
        raise Refused(*refused)
    return size


def described(
    sample: Sample, found: dict[int, Found], location: str, columns: Columns
) -> tuple[Record, dict[str, str]]:
    """A sample as a record without the bytes of its pictures, and its members by field ("image", "json" or "txt").

    A JSON member of our own says what it is; else the columns do.
    """
    content: dict[str, bytes] = {}
    for rest, member in sample.members.items():
        value = found.get(member.offset)
        if isinstance(value, Refused):
            raise value
        if isinstance(value, bytes):
            content[rest] = value
    facts = json_member(content)
    pictures = {rest: EncodedImage(b"", extension_of(rest)) for rest in sample.members if extension_of(rest)}
    if {"kind", "metadata"} <= facts.keys():
        own = checked(own_record(sample.key, facts, pictures))
        return own, {**{rest.rpartition(".")[0]: rest for rest in pictures}, "json": "json"}
    said = sample_draft({**content, **dict.fromkeys(pictures, b"")}, facts, columns)
    record = checked(said.record(sample.key, tuple(pictures[name] for name in said.pictures), location, ""))
    return record, {**dict(zip(record.images, said.pictures, strict=True)), **text_member(record, content, facts)}


def text_member(record: Record, content: Mapping[str, bytes], facts: Mapping[str, Any]) -> dict[str, str]:
    """The member in which readers find the record's text: one that is the text, or the JSON, by the names they know."""
    for rest, data in content.items():
        if rest != "json" and data.decode("utf-8-sig", "replace").strip() == record.prompt:
            return {"txt": rest}
    known = next((facts[name] for name in PROMPTS if facts.get(name)), None)
    if not isinstance(known, str) or known.strip() != record.prompt:
        raise ValueError(
            f"its text is read where it lies from a member of its own, or from {', '.join(PROMPTS)} in its JSON; for "
            "others build shards (data_pipeline.sources.WebDataset)"
        )
    return {"json": "json"}


def checked(record: Record) -> Record:
    """The record, if its facts can be stored and its text is one that a build would keep."""
    if refused := LIMITS.refused_text(storable(record).prompt):
        raise Refused(*refused)
    if len(record.images) > LIMITS.max_pictures:
        raise Refused("too_many_pictures", f"{len(record.images)} pictures, at most {LIMITS.max_pictures}")
    return record


def rows_of(
    record: Record, sample: Sample, fields: dict[str, str], found: dict[int, Found], location: str
) -> Iterator[Row]:
    """The rows of a record, its pictures first, as a shard built here has them."""
    members = {field: sample.members[rest] for field, rest in fields.items()}
    sizes = {field: size for field, member in members.items() if isinstance(size := found[member.offset], tuple)}
    common = {
        **about(record),
        "sample_id": sample_id(f"{location} {record.key}"),  # tars by others number their samples alike
        "min_side": min((min(size) for size in sizes.values()), default=None),
        "aspect": max((max(size) / min(size) for size in sizes.values()), default=None),
        "words": len(record.prompt.split()),
    }
    for field, member in members.items():
        text = found[member.offset]
        width, height = sizes.get(field, (0, 0))
        yield {
            **common,
            "field": field,
            "extension": extension_of(fields[field]) or fields[field].rpartition(".")[2],
            "offset": member.offset,
            "size": member.size,
            "width": width,
            "height": height,
            "sha256": hashlib.sha256(text).digest() if isinstance(text, bytes) else None,
            "xxh3": xxh3_64_intdigest(text) if isinstance(text, bytes) else None,
        }


def summary(ledgers: Sequence[dict[str, Any]], output: Path) -> str:
    """Counts over all tars."""
    known = sum("known" in ledger for ledger in ledgers)
    kept, rejected = Counter[str](), Counter[str]()
    for ledger in ledgers:
        kept.update(ledger["kept"])
        rejected.update(ledger["rejected"])
    taken = sum(ledger["bytes_read"] for ledger in ledgers if "known" not in ledger)
    size = sum(int(ledger["source"]["bytes"]) for ledger in ledgers if "known" not in ledger)
    lines = [f"{len(ledgers)} tars, {known} of them indexed before; read {taken:,} of {size:,} bytes of the others"]
    lines += [f"  {count:,} {kind} records" for kind, count in sorted(kept.items())] or ["  no record"]
    lines += [f"  rejected {count:,}: {reason}" for reason, count in sorted(rejected.items())]
    lines += [f"why each was rejected: {output}/*{LEDGER}"] if rejected else []
    return "\n".join([*lines, "pictures were not read: their sha256 is unknown, and so are duplicates among them"])
