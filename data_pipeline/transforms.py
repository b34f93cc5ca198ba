"""Pictures to tensors at training time: the released size rule, and nothing that could shift a pixel."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.pictures import SIDEWAYS, on_white, orientation, upright
from data_pipeline.shards import READABLE

Size = tuple[int, int]  # (height, width) in pixels
REVISION = 1  # of how pixels are decoded and resized: features of pixels made otherwise are not found in a cache


def fit_size(height: int, width: int, image_size: int, multiple: int) -> Size:
    """UniPic2's rule: the longer side becomes image_size, the other follows, rounded to a multiple (at least one).

    >>> fit_size(600, 800, 512, 32)
    (384, 512)
    """
    fitted_height, fitted_width = fit_sizes(np.asarray([[height, width]]), image_size, multiple)[0].tolist()
    return fitted_height, fitted_width


def fit_sizes(sizes: np.ndarray, image_size: int, multiple: int, upscale: bool = True) -> np.ndarray:
    """`fit_size` of many pictures, (N, 2) to (N, 2); without `upscale`, smaller ones keep their size, rounded."""
    longer = sizes.max(1, keepdims=True, initial=1 if upscale else image_size)
    fitted = np.rint(sizes * (image_size / longer) / multiple)
    return np.maximum(1, fitted).astype(np.int64) * multiple


def check_size(image_size: int, multiple: int) -> None:
    """Refuses a resolution that the model's patches do not divide."""
    if multiple < 1 or image_size < multiple or image_size % multiple:
        near = max(1, round(image_size / max(multiple, 1))) * max(multiple, 1)
        raise InputError(
            f"image_size {image_size} is not divisible by size_multiple {multiple} (autoencoder factor x patch size); "
            f"use {near}"
        )


def decode(data: bytes | memoryview, size: Size | None = None) -> Image.Image:
    """Encoded bytes to an RGB picture: upright by its EXIF orientation, transparency over white; resized to `size`.

    A JPEG that is at least twice too large is decoded at a half, a quarter or an eighth, which is much faster; the rest
    of the way is resized about the same centre.
    """
    with Image.open(io.BytesIO(data), formats=READABLE) as opened:
        full, turned = opened.size, orientation(opened)
        if size is None:
            return on_white(upright(opened, turned))
        wanted = size if turned in SIDEWAYS else size[::-1]
        # A fraction of an odd side has a last pixel of half a picture's: where it is turned to the front, keep away.
        if opened.format in ("JPEG", "MPO") and (turned == 1 or not any(side % 8 for side in full)):
            opened.draft(None, wanted)
        full = full[::-1] if turned in SIDEWAYS else full
        return resized(on_white(upright(opened, turned)), size[::-1], full)


def resized(picture: Image.Image, size: tuple[int, int], full: tuple[int, int]) -> Image.Image:
    """A picture, perhaps decoded at a fraction of its `full` size, at (width, height) by bicubic interpolation."""
    if picture.size == size:
        return picture
    # A fraction's last pixel may reach beyond the picture: the box ends where the picture does.
    fraction = 2 ** max(0, round(math.log2(full[0] / picture.size[0])), round(math.log2(full[1] / picture.size[1])))
    box = tuple(min(whole / fraction, part) for whole, part in zip(full, picture.size, strict=True))
    return picture.resize(size, Image.Resampling.BICUBIC, box=(0, 0, *box))


def to_tensor(picture: Image.Image, size: Size) -> Tensor:
    """An RGB picture at a size (bicubic), (3, H, W) fp32 in [-1, 1]."""
    height, width = size
    pixels = torch.from_numpy(np.asarray(resized(picture, (width, height), picture.size)).copy())
    return pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1
