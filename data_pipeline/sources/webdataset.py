"""WebDataset tars, ours or by others (img2dataset's included): every sample is a record or accounted for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, kept_ids, sample_id, sidecar
from data_pipeline.manifest import built_shards
from data_pipeline.parquet import read as read_table
from data_pipeline.records import KEY_PATTERN, EncodedImage, ReasoningRecord, Record, Rejected, facts, record_from, slug
from data_pipeline.sources.conversations import RowError
from data_pipeline.sources.drafts import Draft, draft
from data_pipeline.sources.folder import MAX_BYTES, existing_path, extension_of
from data_pipeline.sources.layouts import Columns, columns_of
from data_pipeline.sources.protocol import Unit, digest
from data_pipeline.tars import Defect, Sample, samples, scan

TEXTS = ("txt", "caption", "text")  # members that hold a caption
MAX_TEXT = 1 << 20  # bytes of a text or JSON member
SAMPLES, BLOCK = 64, 4096  # of a tar by others, by which it is known

Promised = dict[tuple[str, str], bytes]  # sha256 by key and rest of the member's name, as a sidecar index has them
Images = Mapping[str, EncodedImage]


@dataclass
class WebDataset:
    """Tars below `path`. A JSON member of our own says what a sample is; else one picture with a text is a caption.

    Of a folder that was selected from (keep.parquet) only the records that were kept are read.

    Args:
        path: a tar or a folder of tars.
        layout: what else a sample by others is; one of data_pipeline.sources.layouts.LAYOUTS.
        columns: columns of its JSON, or members by what follows the key: {"sources": "src.jpg", "target": "tgt.jpg"}.
        origin: where the records come from; by default the tar's name.
        licence: their licence.
    """

    path: str = ""
    layout: str = "text_image"
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    origin: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        columns_of(self.layout, self.columns)

    def units(self, records: int) -> Iterator[Unit]:
        """One unit a tar; those of a build are known by its manifest, others by samples: no tar is read whole."""
        builds: dict[Path, dict[str, dict[str, Any]]] = {}
        chosen: dict[Path, dict[str, str]] = {}
        for name, tar in self.tars():
            if tar.parent not in builds:
                builds[tar.parent] = built_shards(tar.parent) or {}
            shard = builds[tar.parent].get(tar.name, {})
            whole = shard.get("bytes") == tar.stat().st_size
            if tar.parent not in chosen:
                keep = tar.parent / KEEP
                chosen[tar.parent] = {"selection": file_digest(keep)} if keep.is_file() else {}
            yield Unit(name, {"file": name, **chosen[tar.parent]}, shard["sha256"] if whole else sampled_hash(tar))

    def tars(self) -> list[tuple[str, Path]]:
        """The tars and their names below `path`, in order."""
        path = existing_path(self.path, "a tar or a folder of tars")
        tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
        if not tars:
            raise InputError(f"source.path {path} holds no *.tar")
        return [(tar.relative_to(path).as_posix() if path.is_dir() else tar.name, tar) for tar in tars]

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a tar, and everything in it that makes none."""
        path = Path(self.path)
        tar = path / unit.where["file"] if path.is_dir() else path
        promised = indexed_hashes(tar)
        kept = selected_ids(tar.parent, unit.where["selection"]) if "selection" in unit.where else None
        whole: set[str] = set()
        with open(tar, "rb") as file:
            for item in samples(scan(file, tar.stat().st_size)):
                if isinstance(item, Defect):
                    yield Rejected(f"byte-{item.offset}", item.reason, f"{unit.name}: {item.detail}")
                    continue
                whole.add(item.key)
                if kept is not None and sample_id(item.key) not in kept:
                    continue
                yield self._record(file, unit.name, item, promised)
        for key in sorted({key for key, _ in promised} - whole):
            yield Rejected(key, "lost", f"{unit.name}: the index has {key!r}, of which the tar holds no whole copy")

    def _record(self, file: BinaryIO, name: str, sample: Sample, promised: Promised) -> Record | Rejected:
        place = f"{name}: sample {sample.key!r}"
        try:
            content = {rest: read_checked(file, sample, rest, promised) for rest in sample.members}
            found = json_member(content)
            images = {
                rest: EncodedImage(data, known) for rest, data in content.items() if (known := extension_of(rest))
            }
            if {"kind", "metadata"} <= found.keys():
                check_pictures(content, found.get("sha256"))
                return storable(own_record(sample.key, found, images))
            return storable(self._foreign(name, sample.key, content, found, images))
        except Damaged as error:
            return Rejected(sample.key, "damaged_sample", f"{place}: {error}")
        except KeyError as error:
            return Rejected(sample.key, "bad_sample", f"{place}: it has no {error.args[0]}")
        except (ValueError, TypeError, RecursionError) as error:
            return Rejected(sample.key, "bad_sample", f"{place}: {error}")

    def _foreign(
        self, name: str, sample: str, content: Mapping[str, bytes], row: dict[str, Any], images: Images
    ) -> Record:
        found = sample_draft(content, row, columns_of(self.layout, self.columns))
        pictures = tuple(images[picture] for picture in found.pictures)
        key = f"{slug(Path(sample).name)[:40]}-{digest(name, sample)[:16]}".lstrip("-")
        return found.record(key, pictures, self.origin or name, self.licence, sample=sample)


def sample_draft(content: Mapping[str, bytes], row: Mapping[str, Any], columns: Columns) -> Draft:
    """What a sample by others says, its pictures by the names of their members; ValueError where it says too little.

    Its columns are those of its JSON, `row`, and its members; the only picture is the column "image" as well, the only
    text "caption". Of pictures the names suffice.
    """
    images = [rest for rest in content if extension_of(rest)]
    wanted = {column for names in columns.named.values() for column in names}
    row = dict(row)
    row |= {
        rest: rest if rest in images else data.decode("utf-8-sig") for rest, data in content.items() if rest in wanted
    }
    text = next((content[member] for member in TEXTS if member in content and member not in row), None)
    if "caption" in wanted and text is not None:
        row["caption"] = text.decode("utf-8-sig")
    if "image" in wanted and images:
        row["image"] = images
    try:
        found = draft(row, columns)
        if absent := [picture for picture in found.pictures if picture not in images]:
            raise RowError(f"it has no member {str(absent[0])[:80]!r}")
    except RowError as error:
        raise ValueError(f"{error}; its members are {', '.join(sorted(content))}") from error
    return found


def own_record(key: str, found: Mapping[str, Any], images: Images) -> Record:
    """The record that a JSON member of our own describes."""
    named = {rest.rpartition(".")[0]: image for rest, image in images.items()}
    record = record_from(key, found, named)
    if not KEY_PATTERN.fullmatch(key) or record.images != named or len(named) != len(images):
        raise ValueError(f"it is no {record.kind} record under a key of [0-9a-z_-]: {', '.join(sorted(images))}")
    return record


def storable(record: Record) -> Record:
    """The record, if its facts are of the types that a shard stores."""
    turns = record.turns if isinstance(record, ReasoningRecord) else ()
    texts = [record.prompt, record.origin, record.licence, record.split, *(part for turn in turns for part in turn)]
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.metadata, Mapping):
        raise ValueError("a fact of it is of a wrong type")
    json.dumps(facts(record), ensure_ascii=False).encode()  # half a surrogate pair is JSON, and is no text
    return record


class Damaged(ValueError):
    """Bytes that are not those that were written."""


def read_checked(file: BinaryIO, sample: Sample, rest: str, promised: Promised) -> bytes:
    """A member's bytes, within the limits and, where an index says what they should be, as they should be."""
    member = sample.members[rest]
    limit = MAX_BYTES if extension_of(rest) else MAX_TEXT
    if member.size > limit:
        raise ValueError(f"{rest} has {member.size} bytes, at most {limit}")
    file.seek(member.offset)
    data = file.read(member.size)
    if promised and hashlib.sha256(data).digest() != promised.get((sample.key, rest)):
        raise Damaged(f"{rest} is not what the index says (its sha256 differs)")
    return data


def check_pictures(content: Mapping[str, bytes], expected: Any) -> None:
    """Compares a sample's pictures with the sha256 in its own JSON."""
    if not isinstance(expected, Mapping):
        raise ValueError("its JSON has no sha256 of its pictures")
    found = {rest: hashlib.sha256(data).hexdigest() for rest, data in content.items() if rest != "json"}
    wrong = sorted(rest for rest in found.keys() | expected.keys() if found.get(rest) != expected.get(rest))
    if wrong:
        raise Damaged(f"{', '.join(wrong)}: not what its JSON says (the sha256 differs, or one is missing)")


def json_member(content: Mapping[str, bytes]) -> dict[str, Any]:
    """The sample's JSON object; empty where it has none."""
    if "json" not in content:
        return {}
    found = json.loads(content["json"].decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"its JSON is a {type(found).__name__}, expected an object")
    return found


def indexed_hashes(tar: Path) -> Promised:
    """The hashes of a sidecar index of ours; empty where there is none, or one made from headers alone."""
    if not sidecar(tar).is_file():
        return {}
    remedy = "remove it to read the tar without what it says"
    rows = read_table(sidecar(tar), ["key", "field", "extension", "sha256"], remedy).to_pylist()
    names = {"json": "{field}"}
    return {
        (row["key"], names.get(row["field"], "{field}.{extension}").format(**row)): row["sha256"]
        for row in rows
        if row["sha256"] is not None
    }


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def selected_ids(folder: Path, selection: str) -> frozenset[int]:
    """The sample ids that a selection of this hash keeps; InputError where another lies there now."""
    found = kept_ids(folder)
    if found is None or file_digest(folder / KEEP) != selection:
        raise InputError(f"{folder / KEEP} changed while it was built from; run the same command again")
    return frozenset(found.tolist())


def sampled_hash(path: Path) -> str:
    """A hash of a file's size and of SAMPLES blocks spread evenly over it, its first and its last among them.

    It is equal wherever the file lies, and differs for other tars; hashing terabytes would take longer than a build.
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        found.update(str(size).encode())
        for i in range(SAMPLES):
            file.seek(max(0, size - BLOCK) * i // (SAMPLES - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()
