"""What a picture and its text are like, without a model: columns for thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.records import Record
from data_pipeline.shards import upright_size
from data_pipeline.steps.columns import column
from data_pipeline.steps.pixels import grey, pixels

REVISION = "2"


@dataclass
class Quality:
    """Sides, sharpness, information and brightness of the worst picture of a record, and the length of its text.

    Columns: `min_side` (pixels), `aspect` (longer side / shorter), `sharpness` (variance of the Laplacian),
    `information` (entropy of the luma, bits), `brightness` (mean luma in [0, 1]), `words`.
    """

    batch_size: int = 64

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        floats = ("aspect", "sharpness", "information", "brightness")
        named = {"min_side": pa.int32(), **dict.fromkeys(floats, pa.float32()), "words": pa.int32()}
        return [column(name, kind, "quality", REVISION) for name, kind in named.items()]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column; those of pictures are null where a record has none."""
        return [self._score(record) for record in records]

    @staticmethod
    def _score(record: Record) -> Mapping[str, Any]:
        images = list(record.images.values())
        sizes = [upright_size(image.data) for image in images]
        lumas = [grey(pixels(image)) for image in images]
        return {
            "min_side": min((min(size) for size in sizes), default=None),
            "aspect": max((max(size) / min(size) for size in sizes), default=None),
            "sharpness": min(map(sharpness, lumas), default=None),
            "information": min(map(entropy, lumas), default=None),
            "brightness": min((float(luma.mean()) / 255 for luma in lumas), default=None),
            "words": len(record.prompt.split()),
        }


def sharpness(luma: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of (H, W) luma; 0 for a flat or tiny picture (Pech-Pacheco et al. 2000)."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return float(laplacian.var())


def entropy(luma: np.ndarray) -> float:
    """Shannon entropy of the histogram of (H, W) luma in [0, 255], bits; 0 for a flat picture, at most 8."""
    counts = np.bincount(luma.astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


@dataclass
class Change:
    """How an edit's target differs from its first source, both at the smaller one's size.

    Columns, null for other records: `changed` (share of pixels that differ by more than `threshold` of 255 in any
    channel, after a 3 x 3 box that takes out compression noise), `change` (mean absolute difference in [0, 1]) and
    `change_box` (share of the picture that the changed pixels' bounding box covers). A no-op edit has `changed` near 0.
    """

    threshold: int = 16
    batch_size: int = 64

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        revision = f"{REVISION}, threshold {self.threshold}"
        return [column(name, pa.float32(), "change", revision) for name in ("changed", "change", "change_box")]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column."""
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> Mapping[str, Any]:
        images = record.images
        if record.kind != "edit":
            return {"changed": None, "change": None, "change_box": None}
        source, target = same_size(pixels(images["source0"]), pixels(images["target"]))
        mask = change_mask(source, target, self.threshold)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / mask.size if rows.size else 0.0
        difference = np.abs(source.astype(np.int16) - target).mean() / 255  # int16: uint8 would wrap around
        return {"changed": float(mask.mean()), "change": float(difference), "change_box": float(box)}


def same_size(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures at the size of the one with fewer pixels, (H, W, 3) uint8."""
    if source.shape == target.shape:
        return source, target
    height, width = min(source.shape[:2], target.shape[:2], key=lambda size: size[0] * size[1])
    resized = (
        Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC) for picture in (source, target)
    )
    first, second = map(np.asarray, resized)
    return first, second


def change_mask(source: np.ndarray, target: np.ndarray, threshold: int) -> np.ndarray:
    """Where two pictures (H, W, 3) uint8 differ, (H, W) bool: the 3 x 3 mean of the largest channel's difference."""
    difference = np.abs(source.astype(np.int16) - target).max(-1).astype(np.float32)
    padded = np.pad(difference, 1, mode="edge")
    height, width = difference.shape
    shifted = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.mean(shifted, axis=0) > threshold
