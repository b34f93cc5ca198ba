"""Decoded pictures for steps that look at them, kept for the next step that looks."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from data_pipeline.pictures import on_white, orientation, upright
from data_pipeline.records import EncodedImage
from data_pipeline.shards import READABLE

SIDE = 512  # pixels of the longer side that is looked at: blur and change are judged at one scale


@lru_cache(maxsize=256)
def pixels(image: EncodedImage) -> np.ndarray:
    """The picture upright, at most SIDE pixels long, (H, W, 3) uint8 on white; not to be written to."""
    with Image.open(io.BytesIO(image.data), formats=READABLE) as opened:
        turned = orientation(opened)
        opened.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at the smallest of its scales that suffices
        picture = on_white(upright(opened, turned))  # first: not every mode can be made smaller
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        array = np.array(picture)
    array.flags.writeable = False
    return array


def grey(array: np.ndarray) -> np.ndarray:
    """Luma of (H, W, 3) uint8 by ITU-R BT.601, (H, W) float32 in [0, 255]."""
    return array.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
