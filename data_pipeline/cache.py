"""Autoencoder moments of pictures, computed once: keyed by content hash, size and encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from data_pipeline.index import IndexedRecord
from data_pipeline.transforms import Size

logger = logging.getLogger(__name__)

CHUNK = 64  # pictures encoded together: one fixed geometry, so that the same picture always gives the same bits


class Encoder(Protocol):
    """What turns pixels into moments."""

    fingerprint: str

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments (B, 2C, h, w), fp32."""
        ...


Item = tuple[str, Size]  # content hash and the size the picture is resized to
Pictures = Mapping[Item, tuple[IndexedRecord, str]]  # where each picture lies: its record and member
Load = Callable[[IndexedRecord, str, Size], Tensor]  # reads one as pixels (3, H, W) in [-1, 1]


class LatentCache:
    """A finished cache: one array of moments a size, memory-mapped, and where each picture's row is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = json.loads((folder / "rows.json").read_text())
        self._rows = {(sha, tuple(size)): row for size, shas in rows for row, sha in enumerate(shas)}
        self._arrays: dict[Size, np.ndarray] = {}

    def moments(self, sha256: str, size: Size) -> Tensor:
        """Moments (2C, h, w) of a picture."""
        if size not in self._arrays:
            self._arrays[size] = np.load(self.folder / array_name(size), mmap_mode="r", allow_pickle=False)
        row = self._rows[sha256, size]
        return torch.from_numpy(self._arrays[size][row].copy())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": {}}  # a worker maps the files itself


def array_name(size: Size) -> str:
    """File of one size."""
    return f"moments-{size[0]}x{size[1]}.npy"


def cache_folder(root: Path, encoder: Encoder, items: Iterable[Item]) -> Path:
    """The one folder for these pictures at these sizes under this encoder; anything else has another name."""
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for sha, size in sorted(items):
        digest.update(f"{sha}{size}".encode())
    return root / digest.hexdigest()[:16]


def build_cache(root: Path, encoder: Encoder, pictures: Pictures, load: Load) -> Path:
    """Encodes what `pictures` name, unless it was done before; returns the cache's folder."""
    folder = cache_folder(root, encoder, pictures)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))
            try:
                _encode_all(partial, encoder, pictures, load)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _encode_all(folder: Path, encoder: Encoder, pictures: Pictures, load: Load) -> None:
    logger.info("encoding %d pictures, once, for the latent cache %s", len(pictures), folder.parent)
    rows: list[tuple[Size, list[str]]] = []
    for size in sorted({size for _, size in pictures}):
        items = sorted(item for item in pictures if item[1] == size)
        chunks = []
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            pixels = torch.zeros(CHUNK, 3, *size)
            for i, item in enumerate(chunk):
                pixels[i] = load(*pictures[item], size)
            chunks.append(encoder.encode(pixels)[: len(chunk)].numpy())
        np.save(folder / array_name(size), np.concatenate(chunks), allow_pickle=False)
        rows.append((size, [sha for sha, _ in items]))
    (folder / "rows.json").write_text(json.dumps(rows))
