"""Perceptual fingerprints, for near-duplicates that other bytes hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.records import Record
from data_pipeline.steps.columns import column
from data_pipeline.steps.pixels import pixels

SIDE = 32


@dataclass
class Fingerprint:
    """Columns `phash`: 64 bits of the picture to learn, as a signed integer, null where a record has no such picture;
    and `phash_others`: those of all its other pictures, in order. Near-duplicates are told by the first; a benchmark's
    picture may be any of them, and that of an edit is a source.

    The sign of the 8 x 8 lowest frequencies of a 32 x 32 luma's cosine transform around their median (Zauner 2010).
    """

    batch_size: int = 64

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        named = {"phash": pa.int64(), "phash_others": pa.list_(pa.int64())}
        return [column(name, kind, "phash", "1") for name, kind in named.items()]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """The fingerprints of each record."""
        return [self._score(record) for record in records]

    @staticmethod
    def _score(record: Record) -> Mapping[str, Any]:
        own = next((name for name in ("image", "target", "chosen") if name in record.images), "")
        found = {name: phash(pixels(image)) for name, image in record.images.items()}
        return {"phash": found.get(own), "phash_others": [value for name, value in found.items() if name != own]}


def phash(picture: np.ndarray) -> int:
    """The fingerprint of (H, W, 3) uint8, a signed 64-bit integer."""
    small = Image.fromarray(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    transform = cosine_matrix()
    low = (transform @ np.asarray(small, np.float64) @ transform.T)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first holds the mean brightness, which says nothing about content
    return int(np.packbits(bits).view(">i8")[0])


@lru_cache(maxsize=1)
def cosine_matrix() -> np.ndarray:
    """DCT-II of length SIDE, (SIDE, SIDE), orthonormal but for the first row."""
    k, n = np.arange(SIDE)[:, None], np.arange(SIDE)[None, :]
    return np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))
