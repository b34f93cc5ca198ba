"""What a picture may go through and still show the same scene: noise of 8/255, a blur of 0.7 pixels, JPEG 80."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter


def noise(picture: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, 8, picture.shape)
    return np.clip(np.rint(picture + drawn), 0, 255).astype(np.uint8)


def blur(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))


def jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return np.asarray(Image.open(buffer))
