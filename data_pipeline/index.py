"""The sidecar index of a shard: where each member lies, what it is and its hash. Parquet, one row a member."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from data_pipeline import parquet, remote
from data_pipeline.errors import InputError
from data_pipeline.manifest import check_built

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_id", pa.int64()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("origin", pa.string()),
        ("licence", pa.string()),
        ("turn", pa.int16()),  # of an editing session, from 0; null outside of one
        ("text_length", pa.int32()),
        ("text_sha256", pa.binary(32)),
        ("pictures_sha256", pa.binary(32)),
        ("field", pa.string()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),
        ("xxh3", pa.uint64()),  # 64 bits of XXH3 of the member's bytes, checked when it is read
    ]
)


COLUMNS = [
    name for name in SCHEMA.names if name not in ("origin", "licence", "text_length", "text_sha256", "pictures_sha256")
]
KEEP = "keep.parquet"
DECIDED = b"indexes"  # in its metadata: the state of the indexes that it was decided on
SUFFIX = ".index.parquet"
LOCATION = b"location"  # of the tar, in a sidecar's metadata, where it is not beside it: an absolute path or a URL
TEXT_FIELDS = ("json", "txt")  # every record has one of them, and one row that is its text's
PROMPTS = ("txt", "caption", "text", "instruction", "prompt")  # what a JSON member may call its text


def with_scores(columns: Sequence[pa.Field]) -> pa.Schema:
    """The schema of an index with score columns; each field's metadata names its scorer and revision."""
    taken = set(SCHEMA.names)
    for column in columns:
        if column.name in taken:
            raise InputError(f"two steps write the score column {column.name}; a recipe may have each once")
        taken.add(column.name)
    return pa.schema([*SCHEMA, *columns])


@dataclass(frozen=True)
class Member:
    """One file of a record inside a tar: byte range, pixels when upright (0 for a text) and sha256 of its bytes.

    Where the bytes were not read when they were indexed, `sha256` names the place they lie at instead: no two places
    share a name, and `hashed` is False.
    """

    offset: int
    size: int
    width: int
    height: int
    extension: str
    sha256: str
    xxh3: int | None = None

    @property
    def hashed(self) -> bool:
        """Whether `sha256` is a hash of the bytes."""
        return len(self.sha256) == 64


@dataclass(frozen=True)
class IndexedRecord:
    """A record's members by name ("image", "source0", "target", "json" or "txt") in one shard, a file or a URL."""

    shard: Path | str
    key: str
    kind: str
    split: str
    sample_id: int
    members: dict[str, Member] = field(default_factory=dict)
    stamp: tuple[int, int | str] | None = None  # size and time of change (of a URL: its tag) that the tar must have
    held: dict[str, bytes] = field(default_factory=dict)  # members that were fetched ahead


def sample_id(key: str) -> int:
    """A stable 63-bit number for a key, for draws: equal wherever and in whatever order the record is stored."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def sidecar(shard: Path) -> Path:
    """The index file beside a tar."""
    return shard.with_suffix(SUFFIX)


def sidecars(folder: Path) -> list[Path]:
    """The index files of a folder of finished shards, or of a folder of indexes of tars elsewhere, in stored order."""
    folder = Path(folder)
    remedy = f"build some: python -m data_pipeline build -c RECIPE --output {folder}"
    if not folder.is_dir():
        raise InputError(f"there is no folder of shards at {folder}; {remedy}")
    shards = sorted(folder.glob("*.tar"))
    if not shards and (indexes := [path for path in sorted(folder.glob(f"*{SUFFIX}")) if location(path)]):
        return indexes
    if not shards:
        raise InputError(f"{folder} holds no shards (*.tar); {remedy}")
    check_built(folder, {shard.name for shard in shards})
    for shard in shards:
        if not sidecar(shard).is_file():
            raise InputError(f"{shard} has no index {sidecar(shard).name} beside it; build the shards again")
    return [sidecar(shard) for shard in shards]


def load_index(folder: Path) -> list[IndexedRecord]:
    """The selected records of a folder of shards, in stored order; all where nothing was selected."""
    folder = Path(folder)
    records = [record for path in sidecars(folder) for record in records_in(path)]
    kept = kept_ids(folder)
    if kept is None:
        return records
    chosen = set(kept.tolist())
    return [record for record in records if record.sample_id in chosen]


def kept_ids(folder: Path) -> np.ndarray | None:
    """The sample ids that a selection kept, sorted; None where nothing was selected.

    Raises InputError where other indexes lie there now than it decided on: their records would never be trained on.
    """
    path = folder / KEEP
    if not path.is_file():
        return None
    table = selection(path)
    if (table.schema.metadata or {}).get(DECIDED, b"").decode() != state_of(sidecars(folder)):
        raise InputError(
            f"{path} was decided on other indexes than lie in {folder} now; select again: python -m data_pipeline "
            f"select {folder}, or delete {path} to train on all records"
        )
    ids: np.ndarray = np.sort(table["sample_id"].to_numpy())
    return ids


def selection(path: Path) -> pa.Table:
    """The sample ids in a keep.parquet, with what it says of itself."""
    table = parquet.read(path, ["sample_id"], "select again")
    if table["sample_id"].type != pa.int64() or table["sample_id"].null_count:
        raise InputError(f"{path} holds {table['sample_id'].type}, expected the ids of records; select again")
    return table


def state_of(listed: Sequence[Path]) -> str:
    """A hash of indexes by their names, sizes and Parquet footers, which say where all columns lie and their bounds."""
    digest = hashlib.sha256()
    for path in listed:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            footer = int.from_bytes(file.read(4), "little") + 8
            file.seek(max(0, size - footer))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()


def location(path: Path) -> str:
    """Where the tar of a sidecar made from headers alone lies, "" for a shard built here, which lies beside it."""
    return (parquet.schema(path).metadata or {}).get(LOCATION, b"").decode()


def shard_of(path: Path, facts: Mapping[bytes, bytes]) -> Path | str:
    """The tar of a sidecar, by the metadata in it: a file, or a URL as a text."""
    found = facts.get(LOCATION, b"").decode()
    return shard_at(found) if found else path.with_name(path.name.removesuffix(SUFFIX) + ".tar")


def shard_at(location: str) -> Path | str:
    """A tar's location: a file, or a URL as a text."""
    return location if remote.is_url(location) else Path(location)


def place_of(facts: Mapping[bytes, bytes]) -> str:
    """A name of one state of one tar elsewhere: its stamp is part of it."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


def named(sha256: bytes | None, place: str, offset: int) -> str:
    """What a member's content is known by: its hash, or where it lies."""
    return sha256.hex() if sha256 else f"at-{place}-{offset}"


def records_in(path: Path) -> Iterator[IndexedRecord]:
    """The records of one sidecar, in stored order."""
    table = parquet.read(path, COLUMNS)
    facts = table.schema.metadata or {}
    yield from records_of(table.to_pylist(), shard_of(path, facts), place_of(facts))


def records_of(rows: Iterable[Mapping[str, Any]], shard: Path | str, place: str) -> Iterator[IndexedRecord]:
    """Rows of a sidecar as records; members of a record are adjacent."""
    current: IndexedRecord | None = None
    for row in rows:
        if current is None or current.key != row["key"]:
            if current is not None:
                yield current
            current = IndexedRecord(shard, row["key"], row["kind"], row["split"], row["sample_id"])
        content = named(row["sha256"], place, row["offset"])
        current.members[row["field"]] = Member(
            row["offset"], row["size"], row["width"], row["height"], row["extension"], content, row["xxh3"]
        )
    if current is not None:
        yield current


Stamp = tuple[int, int]  # size and time of change of a file


class MappedFile:
    """A file mapped into memory; an evicted one goes when nobody holds a part of it any more."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._mapped: tuple[Stamp | None, memoryview] = None, memoryview(b"")

    def current(self) -> tuple[Stamp, memoryview]:
        """The file's stamp and bytes, mapped again if it has changed: what lies behind its end must not be touched.

        Threads share it, so both are replaced at once.
        """
        stamp, view = self._mapped
        if stamp is None or stamp != stamp_of(os.stat(self.path)):
            with open(self.path, "rb") as file:
                stamp = stamp_of(os.fstat(file.fileno()))
                view = memoryview(mmap.mmap(file.fileno(), stamp[0], prot=mmap.PROT_READ) if stamp[0] else b"")
            self._mapped = stamp, view
        return stamp, view


def stamp_of(found: os.stat_result) -> Stamp:
    """What a file that has changed differs in."""
    return found.st_size, found.st_mtime_ns


DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that a process may have; -1 for any number


@lru_cache(maxsize=128 if DESCRIPTORS < 0 else max(8, min(128, DESCRIPTORS // 4)))
def mapped(path: str) -> MappedFile:
    """A file that may be mapped already."""
    return MappedFile(path)


def read_member(record: IndexedRecord, name: str, verify: bool = False) -> bytes:
    """The bytes of a member; `verify` compares them with their hash."""
    return bytes(view_member(record, name, verify))


def view_member(record: IndexedRecord, name: str, verify: bool = False) -> bytes | memoryview:
    """A member without a copy where it lies in a file, which is mapped; a range of a URL is fetched."""
    member = record.members[name]
    data: bytes | memoryview
    if name in record.held:
        data = record.held[name]
    elif isinstance(record.shard, str):
        check_remote(record)
        data = remote.read_range(record.shard, member.offset, member.offset + member.size)
    else:
        try:
            stamp, view = mapped(str(record.shard)).current()
            if record.stamp and stamp != record.stamp:
                raise InputError(
                    f"{record.shard} was replaced or changed after this run had begun; start the run again, it goes on "
                    "where it stood if the samples are the same"
                )
            data = view[member.offset : member.offset + member.size]
        except OSError as error:
            raise InputError(f"cannot read {record.shard}: {error.strerror}; build or index it again") from error
    if len(data) != member.size:
        raise InputError(
            f"{record.shard}: record {record.key} should have {member.size} bytes of {name} at {member.offset}, the "
            f"file ends after {len(data)}; the shard is truncated, build it again, or index it again if it is not ours"
        )
    if verify and member.xxh3 is not None and xxh3_64_intdigest(data) != member.xxh3:
        raise InputError(
            f"{record.shard}: {name} of record {record.key} is not what was indexed (its hash differs): the file was "
            "damaged or changed; build it again, or index it again if it is not ours"
        )
    return data


def check_remote(record: IndexedRecord) -> None:
    """Refuses a record of a tar behind a URL that is not what was indexed."""
    if record.stamp is not None:
        remote.check_unchanged(str(record.shard), record.stamp[0], str(record.stamp[1]))


def read_prompt(record: IndexedRecord, verify: bool = False) -> str:
    """A record's caption or instruction."""
    return read_text(record, verify)[0]


def read_text(record: IndexedRecord, verify: bool = False) -> tuple[str, dict[str, Any]]:
    """A record's caption or instruction, and its metadata (none where the text is a member of its own)."""
    try:
        if "txt" in record.members:
            return read_member(record, "txt", verify).decode("utf-8-sig").strip(), {}
        facts = json.loads(read_member(record, "json", verify))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{record.shard}: the text of {record.key} has changed since it was indexed: {error}"
        ) from error
    return next((facts[name] for name in PROMPTS if facts.get(name)), ""), facts.get("metadata") or {}
