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
    """Column `phash`: 64 bits of the picture to learn, as a signed integer; null where a record has no such picture.

    The sign of the 8 x 8 lowest frequencies of a 32 x 32 luma's cosine transform around their median (Zauner 2010).
    """

    batch_size: int = 64

    def columns(self) -> list[pa.Field]:
        """Name and type."""
        return [column("phash", pa.int64(), "phash", "1")]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A fingerprint for each record."""
        return [self._score(record) for record in records]

    @staticmethod
    def _score(record: Record) -> Mapping[str, Any]:
        image = next((record.images[name] for name in ("image", "target", "chosen") if name in record.images), None)
        return {"phash": None if image is None else phash(pixels(image))}


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
