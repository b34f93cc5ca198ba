"""The index that training reads: how many records each shard has for each stream, and any record on demand.

Memory holds one count a shard and stream. Where a record lies is read from its shard's regrouped file, mapped on use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data_pipeline.index import KEEP, SUFFIX, IndexedRecord, Member, kept_ids, named, shard_at, sidecars
from data_pipeline.plan import Bucket, Stream
from data_pipeline.progress import progress
from data_pipeline.regroup import TASKS, Rule, name_of_role, regroup
from data_pipeline.shards import atomic_write

logger = logging.getLogger(__name__)
VERSION = "1"  # of the regrouped files: others are made again
MAPPED = 256  # regrouped files open at a time
Group = tuple[str, str, Bucket]  # part, set by kind, bucket: records of one shard that are adjacent
Folders = Mapping[str, Sequence[str]]  # folders of shards by the name of their set; "" lets the records name it


def build(root: Path, folders: Folders, rule: Rule) -> Path:
    """Regroups every sidecar that is new or has changed, and sums up: returns the folder of a `ServingIndex`."""
    root.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, Path, Path, np.ndarray | None]] = []
    for name, folder in ((name, Path(folder)) for name, many in folders.items() for folder in many):
        ids = kept_ids(folder)
        kept = None if ids is None else np.sort(np.fromiter(ids, np.int64, len(ids)))
        for path in sidecars(folder):
            file = root / f"{digest(VERSION, rule, facts(path), facts(folder / KEEP))}.json"
            jobs.append((name, path, file, kept))
    output = root / digest([(name, file.name) for name, _, file, _ in jobs])
    with FileLock(root / ".lock"):
        missing = [job for job in jobs if not job[2].is_file()]
        if missing:
            logger.info("sorting %d indexes for training, once, in %s", len(missing), root)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            calls = pool.map(lambda job: regroup(job[1], rule, job[3], job[2]), missing)
            for _ in progress(calls, len(missing), "indexes") if missing else ():
                pass
        if not (output / "index.json").is_file():
            sum_up(output, [(name, file) for name, _, file, _ in jobs])
    return output


def facts(path: Path) -> list[object]:
    """What tells a sidecar, with the tar beside it, or a selection from any other: names, sizes and times of change."""
    beside = path.with_name(path.name.removesuffix(SUFFIX) + ".tar")
    found = [file.stat() for file in (path, beside) if file.is_file()]
    return [str(path.resolve()), *((s.st_size, s.st_mtime_ns) for s in found)]


def digest(*parts: object) -> str:
    """A name for a combination."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def sum_up(output: Path, files: Sequence[tuple[str, Path]]) -> None:
    """Writes the counts of all shards and what their columns are."""
    shards = [(name, json.loads(file.read_bytes())) for name, file in files]
    columns = sorted({(name, *group_of(group)) for name, found in shards for *group, _ in found["groups"]})
    place = {column: i for i, column in enumerate(columns)}
    counts = np.zeros((len(files), len(columns)), dtype=np.int64)
    content = hashlib.sha256()
    for row, (name, found) in enumerate(shards):
        content.update(f"{name} {found['digest']} {found['groups']}".encode())
        for *group, count in found["groups"]:
            counts[row, place[name, *group_of(group)]] = count
    output.mkdir(exist_ok=True)
    np.save(output / "counts.npy", counts)
    index = {"columns": columns, "files": [file.name for _, file in files], "content": content.hexdigest()}
    atomic_write(output / "index.json", json.dumps(index).encode())  # last: it marks the end


def group_of(plain: Sequence[Any]) -> Group:
    """A group from JSON."""
    part, kind, bucket = plain
    return part, kind, tuple((height, width) for height, width in bucket)


class ServingIndex:
    """Records by part ("train" or "val"), stream and number.

    Attributes:
        streams: of each part, the number of records of each stream.
        tasks: the task that each set is for: "text_to_image" or "edit".
        content: a hash of which samples are in which stream, in order; equal wherever the shards lie.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self._root, self.files, self.content = str(folder.parent), index["files"], index["content"]
        self._counts: np.ndarray = np.load(folder / "counts.npy", mmap_mode="r", allow_pickle=False)
        self._ends: dict[int, np.ndarray] = {}
        self._columns: dict[tuple[str, Stream], tuple[int, Group]] = {}
        self.streams: dict[str, dict[Stream, int]] = {"train": {}, "val": {}}
        self.tasks: dict[str, str] = {}
        kinds: dict[str, set[str]] = {}
        for name, _, kind, _ in index["columns"]:
            kinds.setdefault(name, set()).add(kind)
        for column, ((name, *group), total) in enumerate(zip(index["columns"], self._counts.sum(0), strict=True)):
            part, kind, bucket = group_of(group)
            set_name = (name if len(kinds[name]) == 1 else f"{name}.{kind}") if name else kind
            self._columns[part, (set_name, bucket)] = column, (part, kind, bucket)
            self.streams[part][set_name, bucket] = int(total)
            self.tasks[set_name] = TASKS["text_image" if kind == "text_to_image" else "edit"]

    def records(self, part: str, sets: Container[str] | None = None) -> Iterator[tuple[Bucket, IndexedRecord]]:
        """All records of a part and of these sets (None: of all), with their buckets, stream by stream."""
        for stream, count in self.streams[part].items():
            if sets is None or stream[0] in sets:
                yield from ((stream[1], self.record(part, stream, i)) for i in range(count))

    def record(self, part: str, stream: Stream, number: int) -> IndexedRecord:
        """One record of a stream, in the order of folders and shards."""
        file, group, within = self.locate(part, stream, number)
        return regrouped(f"{self._root}/{file}").record(group, within)

    def locate(self, part: str, stream: Stream, number: int) -> tuple[str, Group, int]:
        """The regrouped file that a record is in, its group there, and its number in the group."""
        column, group = self._columns[part, stream]
        if column not in self._ends:
            self._ends[column] = np.cumsum(self._counts[:, column])
        ends = self._ends[column]
        shard = int(np.searchsorted(ends, number, side="right"))
        return self.files[shard], group, number - (int(ends[shard - 1]) if shard else 0)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ends": {}, "_counts": np.asarray(self._counts)}


class RegroupedShard:
    """A regrouped sidecar: its array is mapped, and no row is read until it is asked for."""

    def __init__(self, path: str) -> None:
        about = json.loads(Path(path).read_bytes())
        self.rows: np.ndarray = np.load(Path(path).with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        self.shard, self.stamp, self.place = shard_at(about["shard"]), tuple(about["stamp"]), about["place"]
        self.extensions: list[str] = about["extensions"]
        self.first: dict[Group, int] = {}
        row = 0
        for *group, count in about["groups"]:
            self.first[group_of(group)] = row
            row += count * rows_each(group_of(group))

    def record(self, group: Group, number: int) -> IndexedRecord:
        """The number-th record of a group."""
        first = self.first[group] + number * rows_each(group)
        rows = self.rows[first : first + rows_each(group)].tolist()
        kind, target = ("text_image", "image") if group[1] == "text_to_image" else ("edit", "target")
        members = {name_of_role(row[1], target): self.member(*row[2:]) for row in rows}
        key, sample_id = rows[0][0].decode(), rows[0][4]
        return IndexedRecord(self.shard, key, kind, group[0], sample_id, members, self.stamp)

    def member(
        self, extension: int, sha256: bytes, _: int, offset: int, size: int, width: int, height: int, xxh3: int
    ) -> Member:
        """One file of a record, from its row."""
        content = named(sha256.ljust(32, b"\0") if sha256 else None, self.place, offset)
        return Member(offset, size, width, height, self.extensions[extension], content, xxh3 or None)


def rows_each(group: Group) -> int:
    """Rows of a record: target, references and text."""
    return len(group[2]) + 1


@lru_cache(maxsize=MAPPED)
def regrouped(path: str) -> RegroupedShard:
    """A regrouped file that may be mapped already."""
    return RegroupedShard(path)
