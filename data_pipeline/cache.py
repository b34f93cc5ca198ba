"""Features computed once: an encoder's outputs by what they were made from, in tars that stock tools read.

A store belongs to one encoder, by its fingerprint. An entry's name says what was encoded: the sha256 of the bytes and
what was done to them, or a text. So another picture, size, flip, text or encoder never meets an old entry.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.torch import load, save
from torch import Tensor
from xxhash import xxh3_64_intdigest

from data_pipeline.errors import InputError
from data_pipeline.index import mapped
from data_pipeline.shards import atomic_save, atomic_write

ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<i8"), ("size", "<i8"), ("xxh3", "<u8"), ("tar", "<i8")])
ENTRIES = 1024  # of a tar: what a killed process has to encode again
TOGETHER = 64  # inputs that are loaded before they are encoded
Features = dict[str, Tensor]


class Encoder(Protocol):
    """What turns pictures or texts into features; an input's bits do not depend on what is encoded beside it."""

    fingerprint: str

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
        self._rows = np.empty(0, ROW)
        self._highs = np.empty(0, np.uint64)
        self._pending: dict[str, bytes] = {}
        self._changed = -1

    def _check(self) -> None:
        about = self.folder / "encoder.json"
        if not about.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(about, json.dumps({"fingerprint": self.fingerprint}).encode())
        found = json.loads(about.read_text())["fingerprint"]
        if found != self.fingerprint:
            raise InputError(
                f"the cache {self.folder} was filled by the encoder {found}, this run has {self.fingerprint}; give "
                "another folder for the cache"
            )

    def has_all(self, names: Iterable[str]) -> bool:
        """Whether every entry is there to be read."""
        return all(self._find(name) is not None for name in names)

    def get(self, name: str) -> Features | None:
        """An entry's tensors, or None if there is none. Raises InputError if it was damaged."""
        row = self._find(name)
        if row is None:
            return None
        _, _, offset, size, xxh3, tar = row
        data = mapped(str(self._tars[tar])).current()[1][offset : offset + size]
        if xxh3_64_intdigest(data) != xxh3:
            path = self._tars[tar]
            raise InputError(f"{path} is damaged at byte {offset}; delete {path} and {index_of(path)}")
        return load(bytes(data))

    def read(self, name: str) -> Features:
        """An entry's tensors; a KeyError if there is none."""
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def add(self, name: str, features: Features) -> None:
        """Keeps an entry; it can be read when `commit` has run, by itself after every ENTRIES entries."""
        if self._find(name) is None:
            self._pending[name] = save({key: value.detach().cpu().contiguous() for key, value in features.items()})
        if len(self._pending) >= ENTRIES:
            self.commit()

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

    def _find(self, name: str) -> tuple[int, ...] | None:
        key = key_of(name)
        found = self._look_up(*key)
        if found is None and self._changed != (changed := self.folder.stat().st_mtime_ns):
            self._changed = changed
            self._read_indexes()
            found = self._look_up(*key)
        return found

    def _look_up(self, high: int, low: int) -> tuple[int, ...] | None:
        at = int(self._highs.searchsorted(np.uint64(high)))
        while at < len(self._rows):
            row: tuple[int, ...] = self._rows[at].item()
            if row[:2] == (high, low):
                return row
            if row[0] != high:
                break
            at += 1
        return None

    def _read_indexes(self) -> None:
        """Tables of tars that were finished since."""
        known = set(self._tars)
        new = [path for path in sorted(self.folder.glob("*.tar")) if path not in known and index_of(path).is_file()]
        tables = [np.load(index_of(path), allow_pickle=False) for path in new]
        for number, table in enumerate(tables, len(self._tars)):
            table["tar"] = number
        self._tars += new
        self._rows = np.sort(np.concatenate([self._rows, *tables]), order=["high", "low"])
        self._highs = np.ascontiguousarray(self._rows["high"])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pending": {}}  # a worker adds nothing


def index_of(tar: Path) -> Path:
    """The table beside a tar of entries."""
    return tar.with_suffix(".npy")


def fill(store: FeatureStore, encoder: Encoder, wanted: Iterable[tuple[str, Callable[[], Any]]]) -> int:
    """Encodes the entries that are not there, and returns how many; started again, it goes on.

    Args:
        store: where they go.
        encoder: of the store's fingerprint.
        wanted: names, and what loads the input of each; neighbours of one shape are encoded together.
    """
    count, batch = 0, dict[str, Any]()

    def flush() -> None:
        for name, features in zip(batch, encoder.encode(list(batch.values())), strict=True):
            store.add(name, features)
        batch.clear()

    for name, read in wanted:
        if name in batch or store.has_all([name]):
            continue
        value = read()
        if batch and getattr(value, "shape", None) != getattr(next(iter(batch.values())), "shape", None):
            flush()
        batch[name] = value
        count += 1
        if len(batch) == TOGETHER:
            flush()
    if batch:
        flush()
    store.commit()
    return count
