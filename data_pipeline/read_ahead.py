"""Records behind URLs, fetched before they are asked for: one range each, many at a time, kept in a bounded folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from xxhash import xxh3_64_digest

from data_pipeline import remote
from data_pipeline.errors import InputError
from data_pipeline.index import TEXT_FIELDS, IndexedRecord, Member, check_remote, read_prompt
from data_pipeline.shards import atomic_write

AT_ONCE = 32  # ranges; a store answers each in tens of milliseconds, and many in the same time
GAP = 1 << 16  # bytes between members that are fetched along rather than asked for apart
SWEEP = 64  # one in so many entries, by its name, has us look at how much the folder holds


@dataclass
class LocalCopies:
    """Ranges of remote tars on a local disk, shared by all processes; the oldest are deleted when there are too many.

    Attributes:
        folder: of its own; what lies in it may be deleted at any time.
        gigabytes: at most so much, by 1e9 bytes.
    """

    folder: str
    gigabytes: float = 50.0

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise InputError(f"remote_copies.gigabytes must be above 0, got {self.gigabytes:g}")

    def read(self, url: str, content: str, start: int, end: int) -> bytes:
        """A range, from the folder or fetched; `content` tells one state of the file from another."""
        path = Path(self.folder) / hashlib.sha256(f"{url} {content} {start} {end}".encode()).hexdigest()[:32]
        try:
            data, digest = (stored := path.read_bytes())[:-8], stored[-8:]
        except FileNotFoundError:
            data, digest = b"", b""
        if len(data) != end - start or xxh3_64_digest(data) != digest:
            data = remote.read_range(url, start, end)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, data + xxh3_64_digest(data))
            if int(path.name[:8], 16) % SWEEP == 0:
                self._sweep()
        return data

    def _sweep(self) -> None:
        """Deletes the oldest entries beyond the limit."""
        entries = []
        for entry in os.scandir(self.folder):
            if entry.name.startswith("."):  # somebody is writing it
                continue
            try:
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            except FileNotFoundError:  # another process has deleted it
                continue
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.gigabytes * 1e9:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE)


def fetched(
    records: Sequence[IndexedRecord], names: Sequence[str] | None = None, copies: LocalCopies | None = None
) -> list[IndexedRecord]:
    """The records, with those members at hand (None: all) where they lie behind URLs."""
    tars = {record.shard: record for record in records if isinstance(record.shard, str)}
    if not tars:
        return list(records)
    pool = _pool(os.getpid())
    list(pool.map(check_remote, tars.values()))
    return list(pool.map(lambda record: fetch(record, names, copies), records))


def prompts(records: Iterable[IndexedRecord], copies: LocalCopies | None = None) -> Iterator[str]:
    """The records' captions and instructions, those behind URLs many at a time."""
    waiting = iter(records)
    while chunk := list(islice(waiting, AT_ONCE)):
        yield from map(read_prompt, fetched(chunk, TEXT_FIELDS, copies))


def fetch(record: IndexedRecord, names: Sequence[str] | None, copies: LocalCopies | None) -> IndexedRecord:
    """One record, by one range for all members that are neighbours."""
    if not isinstance(record.shard, str):
        return record
    wanted = {name: m for name, m in record.members.items() if name not in record.held}
    wanted = {name: m for name, m in wanted.items() if names is None or name in names}
    held = dict(record.held)
    for run in neighbours(wanted):
        start, end = wanted[run[0]].offset, max(wanted[name].offset + wanted[name].size for name in run)
        if copies is None:
            data = remote.read_range(record.shard, start, end)
        else:
            data = copies.read(record.shard, wanted[run[0]].sha256, start, end)
        held |= {name: data[wanted[name].offset - start :][: wanted[name].size] for name in run}
    return replace(record, held=held)


def neighbours(members: Mapping[str, Member]) -> Iterator[list[str]]:
    """Names of members in the file's order, in runs without a large gap."""
    run: list[str] = []
    end = 0
    for name in sorted(members, key=lambda name: members[name].offset):
        if run and members[name].offset - end > GAP:
            yield run
            run = []
        run.append(name)
        end = members[name].offset + members[name].size
    if run:
        yield run
