"""Pictures larger than asked are stored smaller; all others keep their bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.pictures import on_white, orientation, upright
from data_pipeline.records import EncodedImage
from data_pipeline.steps.decode import FORMATS, Decode

SCALES = (2, 4, 8)  # at which a JPEG can be decoded directly, for a fraction of the cost
NAMES = {extension: name for name, extension in FORMATS.items()}


@dataclass
class Resize(Decode):
    """Stands in Decode's place, so that a picture is decoded once: its limits, and every picture of a record resized.

    A resized picture is upright, on white and without its colour profile: readers show stored values, so it looks to
    training as it did before. It agrees with averaging over the area of each new pixel to about 40 dB.

    Args:
        longer_side: pixels of the longer side; give this or shorter_side.
        shorter_side: pixels of the shorter side.
        quality: of JPEG and WebP, 1 to 100.
        format: "jpg", "png" or "webp", of resized pictures alone.
        only_shrink: pictures that are smaller keep their bytes; otherwise they are enlarged.
    """

    longer_side: int = 0
    shorter_side: int = 0
    quality: int = 95
    format: Literal["jpg", "png", "webp"] = "jpg"
    only_shrink: bool = True

    def __post_init__(self) -> None:
        sides = (self.longer_side, self.shorter_side)
        if min(sides) != 0 or max(sides) < 1:
            raise InputError(f"longer_side and shorter_side are {sides}; set one of them to at least 1 pixel")
        if self.format not in NAMES or not 1 <= self.quality <= 100:
            raise InputError(
                f"format {self.format!r} of quality {self.quality}; expected {', '.join(NAMES)} of quality 1 to 100"
            )

    def admit(self, picture: Image.Image, image: EncodedImage) -> EncodedImage | tuple[str, str]:
        """The picture's own bytes where it fits, else those of a resized one."""
        size = self.fitted(picture.size)
        if size == picture.size or (self.only_shrink and size > picture.size):
            return super().admit(picture, image)
        if min(size) < self.min_side:
            return "too_small", f"{size[0]} x {size[1]} pixels once resized, each side at least {self.min_side}"
        if size[0] * size[1] > self.max_pixels:
            return "too_many_pixels", f"{size[0]} x {size[1]} pixels once resized, at most {self.max_pixels} in all"
        buffer = io.BytesIO()
        at_size(picture, size).save(buffer, NAMES[self.format], quality=self.quality)
        return EncodedImage(buffer.getvalue(), self.format)

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of a picture of this size once resized; its sides keep their ratio.

        >>> Resize(longer_side=512).fitted((1024, 768))
        (512, 384)
        """
        wanted = self.longer_side or self.shorter_side
        given = max(size) if self.longer_side else min(size)
        width, height = (max(1, round(side * wanted / given)) for side in size)
        return width, height


def at_size(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture, just opened, at `size` (width and height as stored), then turned upright: RGB, nothing attached."""
    turned = orientation(picture)
    exact = [k for k in SCALES if size == (-(-picture.width // k), -(-picture.height // k))]
    roomy = [k for k in SCALES if max(picture.size) >= 2 * k * max(size)]  # leaves enough pixels to average over
    k = max(exact or roomy, default=1)
    drafted = picture.draft("RGB", (picture.width // k, picture.height // k)) if k > 1 else None
    found = on_white(picture)
    box = drafted[1] if drafted else (0, 0, *found.size)  # the last pixels of a JPEG at 1/k may reach over its edge
    factor = found.width // size[0]
    if found.size == (factor * size[0], factor * size[1]) == box[2:]:
        found = found.reduce(factor) if factor > 1 else found
    else:  # where new pixels share old ones, Hamming is nearer to their areas than Pillow's box, which shares none
        filters = Image.Resampling
        found = found.resize(size, filters.HAMMING if found.size > size else filters.BICUBIC, box)
    found = upright(found, turned)
    found.info.clear()
    return found
