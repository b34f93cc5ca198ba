"""The sidecar index of a shard: where each member lies, what it is and its hash. Parquet, one row a member."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import InputError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_id", pa.int64()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("field", pa.string()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Member:
    """One file of a record inside a tar: byte range, pixels when upright (0 for JSON) and sha256 of its bytes."""

    offset: int
    size: int
    width: int
    height: int
    extension: str
    sha256: str


@dataclass(frozen=True)
class IndexedRecord:
    """A record's members by name ("image", "source0", "target", "json") in one shard."""

    shard: Path
    key: str
    kind: str
    split: str
    sample_id: int
    members: dict[str, Member] = field(default_factory=dict)


def sample_id(key: str) -> int:
    """A stable 63-bit number for a key, for draws: equal wherever and in whatever order the record is stored."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def sidecar(shard: Path) -> Path:
    """The index file beside a tar."""
    return shard.with_suffix(".index.parquet")


def load_index(folder: Path) -> list[IndexedRecord]:
    """All records of a folder of shards, in stored order."""
    folder = Path(folder)
    remedy = f"build some: python -m data_pipeline build -c RECIPE --output {folder}"
    if not folder.is_dir():
        raise InputError(f"there is no folder of shards at {folder}; {remedy}")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise InputError(f"{folder} holds no shards (*.tar); {remedy}")
    records: list[IndexedRecord] = []
    for shard in shards:
        if not sidecar(shard).is_file():
            raise InputError(f"{shard} has no index {sidecar(shard).name} beside it; build the shards again")
        records.extend(_grouped(shard))
    return records


def _grouped(shard: Path) -> Iterable[IndexedRecord]:
    """Rows of one sidecar to records; members of a record are adjacent."""
    current: IndexedRecord | None = None
    try:
        rows = pq.read_table(sidecar(shard), schema=SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{sidecar(shard)} is damaged, build the shards again: {error}") from error
    for row in rows:
        if current is None or current.key != row["key"]:
            if current is not None:
                yield current
            current = IndexedRecord(shard, row["key"], row["kind"], row["split"], row["sample_id"])
        names = ("offset", "size", "width", "height", "extension", "sha256")
        current.members[row["field"]] = Member(*(row[name] for name in names))
    if current is not None:
        yield current


@lru_cache(maxsize=256)
def _descriptor(path: str, process: int) -> int:
    # One descriptor a file and process: a descriptor inherited by fork is fine to pread, but may have been evicted.
    return os.open(path, os.O_RDONLY)


def read_member(record: IndexedRecord, name: str) -> bytes:
    """The bytes of a member, by one positional read."""
    member = record.members[name]
    data = os.pread(_descriptor(str(record.shard), os.getpid()), member.size, member.offset)
    if len(data) != member.size:
        raise InputError(
            f"{record.shard}: record {record.key} should have {member.size} bytes of {name} at {member.offset}, the "
            f"file ends after {len(data)}; the shard is truncated, build it again"
        )
    return data
