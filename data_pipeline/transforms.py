"""Pictures to tensors at training time: the released size rule, and nothing that could shift a pixel."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.pictures import on_white

Size = tuple[int, int]  # (height, width) in pixels


def fit_size(height: int, width: int, image_size: int, multiple: int) -> Size:
    """UniPic2's rule: the longer side becomes image_size, the other follows, rounded to a multiple (at least one).

    >>> fit_size(600, 800, 512, 32)
    (384, 512)
    """
    scale = image_size / max(height, width)

    def rounded(side: int) -> int:
        return max(multiple, round(side * scale / multiple) * multiple)

    return rounded(height), rounded(width)


def check_size(image_size: int, multiple: int) -> None:
    """Refuses a resolution that the model's patches do not divide."""
    if multiple < 1 or image_size < multiple or image_size % multiple:
        near = max(1, round(image_size / max(multiple, 1))) * max(multiple, 1)
        raise InputError(
            f"image_size {image_size} is not divisible by size_multiple {multiple} (autoencoder factor x patch size); "
            f"use {near}"
        )


def decode(data: bytes) -> Image.Image:
    """Encoded bytes to an RGB picture: upright by its EXIF orientation, transparency over white."""
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as opened:
        return on_white(ImageOps.exif_transpose(opened))


def to_tensor(picture: Image.Image, size: Size) -> Tensor:
    """An RGB picture at a size (bicubic), (3, H, W) fp32 in [-1, 1]."""
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture).copy())
    return pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1
