"""The index that training reads: how many records there are of each stream, and any record on demand.

All records lie in one array, stream by stream, which is mapped: memory holds a few numbers a stream, however many
shards there are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock

from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, SUFFIX, IndexedRecord, Member, kept_ids, location, named, shard_at, sidecars
from data_pipeline.plan import Bucket, Stream
from data_pipeline.progress import progress
from data_pipeline.regroup import SETS, Group, Part, Rule, name_of_role, regroup
from data_pipeline.shards import atomic_save, atomic_write

logger = logging.getLogger(__name__)
VERSION = "2"  # of the folders: others are made again
KEPT = 16  # folders that are not deleted, the last used ones: each selection, image size and set of folders has its own
OURS = re.compile(r"[0-9a-f]{20}(\.json|\.npy)?")
Column = tuple[str, Group]  # a set's name or "", and a group: records of one stream
Folders = Mapping[str, Sequence[str]]  # folders of shards by the name of their set; "" lets the records name it


def build(root: Path, folders: Folders, rule: Rule) -> Path:
    """Regroups all sidecars unless this was done before; returns the folder of a `ServingIndex`."""
    root.mkdir(parents=True, exist_ok=True)
    sources = [(name, Path(folder)) for name, many in folders.items() for folder in many]
    jobs = [(name, path, facts(path), facts(folder / KEEP)) for name, folder in sources for path in sidecars(folder)]
    kept = {folder: kept_ids(folder) for _, folder in sources}
    output = root / digest(VERSION, rule, jobs)
    with FileLock(root / ".lock"):
        if not readable(output):
            shutil.rmtree(output, ignore_errors=True)  # not written over: another run may have mapped it
            logger.info("sorting %d indexes for training, once, in %s", len(jobs), root)
            with TemporaryDirectory(dir=root) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
                calls = pool.map(
                    lambda i: regroup(jobs[i][1], rule, kept[jobs[i][1].parent], Path(scratch, f"{i}.npy")),
                    range(len(jobs)),
                )
                parts = list(progress(calls, len(jobs), "indexes"))
                merge(output, [(name, part) for (name, *_), part in zip(jobs, parts, strict=True)])
        os.utime(output, ns=(time.time_ns(), time.time_ns()))  # finer than the system's own
        forget(root)
    return output


def readable(folder: Path) -> bool:
    """Whether a folder was finished and is whole."""
    try:
        return (folder / "index.json").is_file() and bool(ServingIndex(folder).content)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        logger.warning("%s is damaged and made again", folder)
        return False


def facts(path: Path) -> list[object]:
    """What tells a sidecar, with its tar, or a selection from any other: names, sizes and times of change."""
    files = [path, path.with_name(path.name.removesuffix(SUFFIX) + ".tar")]
    if path.name.endswith(SUFFIX) and not files[1].is_file():
        files[1] = Path(location(path))
    found = [file.stat() for file in files if file.is_file()]
    return [str(path.resolve()), *((s.st_size, s.st_mtime_ns) for s in found)]


def digest(*parts: object) -> str:
    """A name for a combination."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def forget(root: Path) -> None:
    """Deletes all but the folders that were used last; who has mapped one keeps it."""
    ours = [path for path in root.iterdir() if OURS.fullmatch(path.name)]
    whole = sorted((p for p in ours if (p / "index.json").is_file()), key=lambda p: p.stat().st_mtime_ns)
    for path in set(ours) - set(whole[-KEPT:]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def merge(output: Path, parts: Sequence[tuple[str, Part]]) -> None:
    """Writes the records of all parts, stream by stream and in each in the order of the parts."""
    counts = Counter[Column]()
    for name, part in parts:
        counts.update({(name, group): count for group, count in part.groups.items()})
    sizes = [counts[column] * rows_each(*column[1][1:]) for column in sorted(counts)]
    first = dict(zip(sorted(counts), accumulate(sizes, initial=0), strict=False))
    free = dict(first)
    output.mkdir(exist_ok=True)
    dtype = widest([part.dtype for _, part in parts])
    rows = np.lib.format.open_memmap(output / "rows.npy", "w+", dtype, (sum(sizes),))
    for shard, (name, part) in enumerate(parts):
        array, done = np.load(part.rows, allow_pickle=False), 0
        array["shard"] = shard
        for group, count in part.groups.items():
            at, size = free[name, group], count * rows_each(*group[1:])
            rows[at : at + size] = array[done : done + size]
            free[name, group], done = at + size, done + size
    rows.flush()
    atomic_save(output / "shards.npy", table_of([part for _, part in parts]))
    index = {
        "columns": [(name, *group, counts[name, group], at) for (name, group), at in first.items()],
        "content": digest([(name, part.digest, part.groups) for name, part in parts]),
    }
    atomic_write(output / "index.json", json.dumps(index).encode())  # last: it marks the end


def widest(dtypes: Sequence[np.dtype[np.void]]) -> np.dtype[np.void]:
    """The fields of these with room for the longest text of each."""
    names = dtypes[0].names or ()
    return np.dtype([(name, max((d[name] for d in dtypes), key=lambda d: d.itemsize)) for name in names])


def table_of(parts: Sequence[Part]) -> np.ndarray:
    """Location, size, what changes with the content, and place of each tar."""
    locations, tags, places = (
        np.asarray([text.encode() for text in texts], dtype=np.bytes_)
        for texts in zip(*((p.shard[0], p.shard[2], p.place) for p in parts), strict=True)
    )
    fields = [("location", locations.dtype), ("size", "<i8"), ("tag", tags.dtype), ("place", places.dtype)]
    table = np.empty(len(parts), dtype=fields)
    table["location"], table["tag"], table["place"] = locations, tags, places
    table["size"] = [part.shard[1] for part in parts]
    return table


def mapped_array(path: Path) -> np.ndarray:
    """An array in a file that is read here and there: what lies beside a row is not read along."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    found.base.madvise(mmap.MADV_RANDOM)
    array: np.ndarray = found.view(np.ndarray)
    return array


def rows_each(set_name: str, bucket: Bucket) -> int:
    """Rows of a record: target (prompts have none), references and text."""
    return len(bucket) + (SETS[set_name][0] != "prompt")


class ServingIndex:
    """Records by part ("train" or "val"), stream and number.

    Attributes:
        streams: of each part, the number of records of each stream.
        tasks: the task that each set is for: "text_to_image" or "edit".
        content: a hash of which samples are in which stream, in order; equal wherever the shards lie.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.folder, self.content = folder, index["content"]
        self._rows, self._shards = (mapped_array(folder / name) for name in ("rows.npy", "shards.npy"))
        self._columns: dict[tuple[str, Stream], tuple[str, int]] = {}  # set by its records, first row
        self._known: dict[int, tuple[Path | str, tuple[int, int | str], str]] = {}  # shards that were asked for
        self.streams: dict[str, dict[Stream, int]] = {"train": {}, "val": {}}
        self.tasks: dict[str, str] = {}
        kinds: dict[str, set[str]] = {}
        owners: dict[str, str] = {}
        for name, _, kind, *_ in index["columns"]:
            kinds.setdefault(name, set()).add(kind)
        for name, part, kind, sizes, count, first in index["columns"]:
            set_name = (name if len(kinds[name]) == 1 else f"{name}.{kind}") if name else kind
            stream = set_name, tuple((height, width) for height, width in sizes)
            if owners.setdefault(set_name, name) != name:
                raise InputError(
                    f"two sets of data.shards are called {set_name}: one of your own, and one of records that name "
                    "their set themselves (of scenes too); give yours another name"
                )
            self._columns[part, stream] = kind, first
            self.streams[part][stream] = count
            self.tasks[set_name] = SETS[kind][1]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return ServingIndex, (self.folder,)  # another process maps the files itself

    def pictures(self, part: str, sets: Container[str] | None = None) -> int:
        """How many pictures the records of a part and of these sets (None: of all) have."""
        chosen = {stream: n for stream, n in self.streams[part].items() if sets is None or stream[0] in sets}
        return sum((rows_each(self._columns[part, stream][0], stream[1]) - 1) * n for stream, n in chosen.items())

    def records(self, part: str, sets: Container[str] | None = None) -> Iterator[tuple[Bucket, IndexedRecord]]:
        """All records of a part and of these sets (None: of all), with their buckets, stream by stream."""
        for stream, count in self.streams[part].items():
            if sets is None or stream[0] in sets:
                yield from ((stream[1], self.record(part, stream, i)) for i in range(count))

    def record(self, part: str, stream: Stream, number: int) -> IndexedRecord:
        """One record of a stream, in the order of folders and shards."""
        set_name, first = self._columns[part, stream]
        kind, each = SETS[set_name][0], rows_each(set_name, stream[1])
        rows = self._rows[first + number * each : first + (number + 1) * each].tolist()
        key, _, _, shard, _, sample_id, *_ = rows[0]
        tar, stamp, place = self._known.get(shard) or self._shard(shard)
        target = "image" if kind == "text_image" else "target"
        members = {name_of_role(row[2], target): member(place, row) for row in rows}
        return IndexedRecord(tar, key.decode(), kind, part, sample_id, members, stamp)

    def _shard(self, number: int) -> tuple[Path | str, tuple[int, int | str], str]:
        """Where a shard lies, what it differs in once it has changed, and how pictures without a hash are named."""
        where, size, tag, place = self._shards[number].tolist()
        tar = shard_at(where.decode())
        stamp = size, tag.decode() if isinstance(tar, str) else int(tag)
        found = self._known[number] = tar, stamp, place.decode()
        return found


def member(place: str, row: tuple[Any, ...]) -> Member:
    """One file of a record, from its row."""
    _, extension, _, _, sha256, _, offset, size, width, height, xxh3 = row
    content = named(sha256.ljust(32, b"\0") if sha256 else None, place, offset)
    return Member(offset, size, width, height, extension.decode(), content, xxh3 or None)
