"""Only what decodes goes on: allowed formats, a pixel limit read from the header, and a text."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from data_pipeline.records import EncodedImage, Record, Rejected, facts, record_from

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
UNKNOWN = f"no {', '.join(FORMATS)}"  # of bytes that are no picture: Pillow's own words hold a memory address
FOUND = {**FORMATS, "MPO": "jpg"}  # a phone's JPEG with further pictures behind it; every reader sees the first


@dataclass
class Decode:
    """Rejects unreadable, oversized, tiny or animated pictures and empty texts.

    Args:
        max_pixels: width x height above which a picture is not decoded.
        min_side: smallest allowed side in pixels.
        max_text: longest allowed text in characters.
        max_pictures: most pictures of a record; training reads a target and 64 references.
    """

    max_pixels: int = 64_000_000
    min_side: int = 8
    max_text: int = 10_000
    max_pictures: int = 65

    def __call__(self, record: Record) -> Record | Rejected:
        if refused := self.refused_text(record.prompt):
            return Rejected(record.key, *refused)
        if len(record.images) > self.max_pictures:
            detail = f"{len(record.images)} pictures, at most {self.max_pictures}"
            return Rejected(record.key, "too_many_pictures", detail)
        checked: dict[str, EncodedImage] = {}
        for name, image in record.images.items():
            found = self.check(image)
            if isinstance(found, tuple):
                return Rejected(record.key, found[0], f"{name}: {found[1]}")
            checked[name] = found
        return record_from(record.key, facts(record), checked)

    def check(self, image: EncodedImage) -> EncodedImage | tuple[str, str]:
        """The picture with the extension of its true format, or (reason, detail)."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own size warning: our limit decides
                with Image.open(io.BytesIO(image.data), formats=list(FORMATS)) as picture:
                    if refused := self.refused_size(*picture.size):
                        return refused
                    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
                        return "animated", f"{picture.n_frames} frames"  # type: ignore[attr-defined]
                    return self.admit(picture, EncodedImage(image.data, FOUND[str(picture.format)]))
        except Image.DecompressionBombError as error:
            return "too_many_pixels", str(error)
        except UnidentifiedImageError:
            return "unreadable_image", UNKNOWN
        except Exception as error:  # a hostile file may raise anything inside a decoder
            return "unreadable_image", f"{type(error).__name__}: {error}"

    def refused_text(self, text: str) -> tuple[str, str] | None:
        """(reason, detail) for an empty or too long text."""
        length = len(text.strip())
        if not length:
            return "empty_text", "the caption or instruction is empty"
        return ("text_too_long", f"{length} characters, at most {self.max_text}") if length > self.max_text else None

    def refused_size(self, width: int, height: int) -> tuple[str, str] | None:
        """(reason, detail) for a picture with too many pixels or a side that is too small."""
        if width * height > self.max_pixels:
            return "too_many_pixels", f"{width} x {height} pixels, at most {self.max_pixels} in all"
        if min(width, height) < self.min_side:
            return "too_small", f"{width} x {height} pixels, each side at least {self.min_side}"
        return None

    def admit(self, picture: Image.Image, image: EncodedImage) -> EncodedImage | tuple[str, str]:
        """What goes on of a picture within the limits, opened from `image`: its own bytes, since they decode."""
        picture.load()
        return image
