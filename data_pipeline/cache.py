"""Features computed once: an encoder's outputs by what they were made from, in tars that stock tools read.

A store belongs to one encoder, by its fingerprint. An entry's name says what was encoded: the sha256 of the bytes and
what was done to them, or a text. So another picture, size, flip, text or encoder never meets an old entry.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor
from xxhash import xxh3_64_intdigest

from data_pipeline.errors import InputError
from data_pipeline.index import mapped
from data_pipeline.progress import progress
from data_pipeline.shards import atomic_save, atomic_write

logger = logging.getLogger(__name__)
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<i8"), ("size", "<i8"), ("xxh3", "<u8"), ("tar", "<i8")])
ENTRIES, BYTES = 1024, 1 << 28  # of a tar, at most: what memory holds, and a killed process has to encode again
KEPT = 64 << 20  # bytes of entries that stay in memory once they have been read
TOGETHER = 64  # inputs that are loaded before they are encoded
ABOUT = "encoder.json"
READERS = 16  # threads that load them: decoding takes processors, and shards behind URLs waiting
Features = dict[str, Tensor]


class Encoder(Protocol):
    """What turns pictures or texts into features; an input's bits do not depend on what is encoded beside it."""

    @property
    def fingerprint(self) -> str:
        """What no encoder of other features has."""
        ...

    def to(self, device: torch.device | str) -> object:
        """Moves the encoder; what it encodes may lie anywhere."""
        ...

    def encode(self, inputs: Sequence[Any]) -> list[Features]:
        """The features of each input; pixels (3, H, W) in [-1, 1] of one shape, or texts."""
        ...


def key_of(name: str) -> tuple[int, int]:
    """128 bits of an entry's name."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class FeatureStore:
    """The entries of one encoder; several processes may read and add to it at a time.

    Args:
        root: folder of stores.
        fingerprint: the encoder's.
    """

    def __init__(self, root: Path | str, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(root) / fingerprint[:16], fingerprint
        self._check()
        self._tars: list[Path] = []
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []  # sorted rows and their upper halves, the largest first
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0
        self._kept: dict[str, Features] = {}
        self._kept_bytes = 0
        self._changed = -1

    @classmethod
    def of(cls, root: Path | str, encoder: Encoder) -> FeatureStore:
        """An encoder's store. Where the encoder can say what it is loaded from (`origin`) and has said so here before,
        it is not loaded for its fingerprint, which takes all its weights."""
        origin: str | None = getattr(encoder, "origin", None)
        known = [] if origin is None else sorted(Path(root).glob(f"*/{origin}.origin"))
        store = cls(root, fingerprint_of(known[0].parent) if known else encoder.fingerprint)
        if origin is not None and not known:
            atomic_write(store.folder / f"{origin}.origin", b"")
        return store

    def _check(self) -> None:
        about = self.folder / ABOUT
        if not about.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(about, json.dumps({"fingerprint": self.fingerprint}).encode())
        found = fingerprint_of(self.folder)
        if found != self.fingerprint:
            raise InputError(
                f"the cache {self.folder} was filled by the encoder {found}, this run has {self.fingerprint}; give "
                "another folder for the cache"
            )

    def __contains__(self, name: str) -> bool:
        """Whether an entry is there to be read."""
        return self._find(name) is not None

    def get(self, name: str) -> Features | None:
        """An entry's tensors, not to be changed, or None if there is none. Raises InputError if it was damaged."""
        if (kept := self._kept.get(name)) is not None:
            return kept
        row = self._find(name)
        if row is None:
            return None
        _, _, offset, size, xxh3, tar = row
        data = mapped(str(self._tars[tar])).current()[1][offset : offset + size]
        if xxh3_64_intdigest(data) != xxh3:
            path = self._tars[tar]
            raise InputError(f"{path} is damaged at byte {offset}; delete {path} and {index_of(path)}")
        features = load(bytes(data))
        if self._kept_bytes + size <= KEPT:
            self._kept[name] = features
            self._kept_bytes += size
        return features

    def add(self, name: str, features: Features) -> None:
        """Keeps an entry; it can be read when `commit` has run, by itself when there is enough for a tar."""
        if name not in self and name not in self._pending:
            self._pending[name] = save({key: value.detach().cpu().contiguous() for key, value in features.items()})
            self._pending_bytes += len(self._pending[name])
        if len(self._pending) >= ENTRIES or self._pending_bytes >= BYTES:
            self.commit()

    def pending(self, name: str) -> bool:
        """Whether an entry was added that `commit` has not written yet."""
        return name in self._pending

    def commit(self) -> None:
        """Writes what was added, as one tar and its index, whole or not at all."""
        if not self._pending:
            return
        buffer, rows = io.BytesIO(), np.empty(len(self._pending), ROW)
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (name, data) in enumerate(sorted(self._pending.items(), key=lambda item: key_of(item[0]))):
                high, low = key_of(name)
                entry = tarfile.TarInfo(f"{high:016x}{low:016x}.safetensors")
                entry.size = len(data)
                rows[i] = high, low, tar.offset + tarfile.BLOCKSIZE, len(data), xxh3_64_intdigest(data), 0
                tar.addfile(entry, io.BytesIO(data))
        path = self.folder / f"{hashlib.sha256(rows.tobytes()).hexdigest()[:16]}.tar"
        atomic_write(path, buffer.getvalue())
        atomic_save(index_of(path), rows)  # last: it marks the end
        self._pending.clear()
        self._pending_bytes = 0

    def _find(self, name: str) -> tuple[int, ...] | None:
        key = key_of(name)
        found = self._look_up(*key)
        if found is None and self._changed != (changed := self.folder.stat().st_mtime_ns):
            self._changed = changed
            self._read_indexes()
            found = self._look_up(*key)
        return found

    def _look_up(self, high: int, low: int) -> tuple[int, ...] | None:
        for rows, highs in self._tables:
            at = int(highs.searchsorted(np.uint64(high)))
            while at < len(rows) and highs[at] == high:
                row: tuple[int, ...] = rows[at].item()
                if row[1] == low:
                    return row
                at += 1
        return None

    def _read_indexes(self) -> None:
        """Tables of tars that were finished since, merged with those that are not much larger: none is sorted often."""
        known = set(self._tars)
        read = {path: table_of(path) for path in sorted(self.folder.glob("*.tar")) if path not in known}
        new, tables = [path for path in read if len(read[path])], [table for table in read.values() if len(table)]
        for number, table in enumerate(tables, len(self._tars)):
            table["tar"] = number
        self._tars += new
        while self._tables and len(self._tables[-1][0]) <= 2 * sum(map(len, tables)):
            tables.append(self._tables.pop()[0])
        if tables:
            rows = np.sort(np.concatenate(tables), order=["high", "low"])
            self._tables.append((rows, np.ascontiguousarray(rows["high"])))

    def __getstate__(self) -> dict[str, object]:
        empty = {"_pending": {}, "_pending_bytes": 0, "_kept": {}, "_kept_bytes": 0}  # a worker adds nothing
        return {**self.__dict__, **empty}


def fingerprint_of(folder: Path) -> str:
    """The encoder's that filled a store."""
    try:
        return str(json.loads((folder / ABOUT).read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise InputError(f"{folder / ABOUT} is damaged; delete {folder}, it is filled again") from error


def index_of(tar: Path) -> Path:
    """The table beside a tar of entries."""
    return tar.with_suffix(".npy")


def table_of(tar: Path) -> np.ndarray:
    """The entries of a tar, none of one that is unfinished or damaged: what it held is encoded again."""
    try:
        rows: np.ndarray = np.load(index_of(tar), allow_pickle=False)
        if rows.dtype == ROW and tar.stat().st_size >= (rows["offset"] + rows["size"]).max(initial=0):
            return rows
    except FileNotFoundError:
        return np.empty(0, ROW)
    except (OSError, ValueError, EOFError):
        pass
    logger.warning("%s or its index is damaged; what it held is encoded again", tar)
    return np.empty(0, ROW)


def fill(store: FeatureStore, encoder: Encoder, wanted: Iterable[tuple[str, Callable[[], Any]]], total: int) -> int:
    """Encodes the entries that are not there, and returns how many; started again, it goes on.

    One process at a time: those of other machines wait, and then find the entries.

    Args:
        store: where they go.
        encoder: of the store's fingerprint.
        wanted: names, and what loads the input of each.
        total: how many.
    """
    count, batch = 0, dict[str, Callable[[], Any]]()
    with locked(store.folder / ".lock"), ThreadPoolExecutor(READERS) as pool:

        def flush() -> None:
            inputs = list(pool.map(lambda read: read(), batch.values()))
            for name, features in zip(batch, encoder.encode(inputs), strict=True):
                store.add(name, features)
            batch.clear()

        for name, read in progress(wanted, total, "features"):
            if name not in batch and not store.pending(name) and name not in store:
                batch[name] = read
                count += 1
            if len(batch) == TOGETHER:
                flush()
        if batch:
            flush()
        store.commit()
    return count


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock; says so where it has to be waited for."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for another process that fills %s", path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_filled(store: FeatureStore, names: Iterable[str]) -> None:
    """Refuses a store that lacks any of the entries, with their number and what else the cache holds."""
    absent, total, first = 0, 0, ""
    for total, name in enumerate(names, 1):  # noqa: B007
        if name not in store:
            absent, first = absent + 1, first or name
    if not absent:
        return
    abouts = sorted(store.folder.parent.glob(f"*/{ABOUT}"))
    others = [about.parent.name for about in abouts if about.parent != store.folder]
    hint = f" (it holds those of other encoders: {', '.join(others)})" if others else ""
    raise InputError(
        f"the cache {store.folder.parent} has no entry of the encoder {store.folder.name} for {absent:,} of {total:,} "
        f"pictures, first {first}{hint}; fill it with python -m data_pipeline cache, give the checkpoint folder that "
        'it was filled with, or set cache.fill to "ahead" or "lazy"'
    )
