"""Sizes of pictures from their first bytes, read by ranges: nothing is decoded and nothing read whole."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO, cast

from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import InputError
from data_pipeline.pictures import SIDEWAYS, orientation
from data_pipeline.steps.decode import UNKNOWN

WINDOW = 4096  # bytes taken at a time: a header, a picture's beginning and short texts lie within
MAX_HEADER = 1 << 20  # bytes of one picture that are read for its size: profiles and previews may come before it
MAX_CHUNKS = 64  # of a WebP file that are looked at for an orientation


class Refused(ValueError):
    """Why a member cannot be used: a short reason that is counted, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Ranges:
    """A file of `size` bytes that is read by ranges, a window at a time; `taken` counts the bytes fetched."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self.fetch, self.size, self.taken = fetch, size, 0
        self.position, self.start, self.window = 0, 0, b""

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        end = self.size if count < 0 else min(self.position + count, self.size)
        if not 0 <= self.position < end:
            return b""
        if self.position < self.start or end > self.start + len(self.window):
            self.start = self.position
            self.window = self.fetch(self.start, min(max(end, self.start + WINDOW), self.size))
            self.taken += len(self.window)
            if self.start + len(self.window) < end:
                raise InputError(f"a tar of {self.size} bytes ended at {self.start + len(self.window)}; index it again")
        data = self.window[self.position - self.start : end - self.start]
        self.position = end
        return data

    def close(self) -> None:
        self.window = b""


class Part(Ranges):
    """One member of a file, of which no more than MAX_HEADER bytes are given out."""

    def __init__(self, file: Ranges, offset: int, size: int) -> None:
        super().__init__(file.fetch, size)
        self.file, self.offset, self.left = file, offset, MAX_HEADER

    def read(self, count: int = -1) -> bytes:
        end = self.size if count < 0 else min(self.position + count, self.size)
        if not 0 <= self.position < end:
            return b""
        self.left -= end - self.position
        if self.left < 0:
            raise Refused("unreadable_image", f"its size is not within its first {MAX_HEADER} bytes")
        self.file.seek(self.offset + self.position)
        data = self.file.read(end - self.position)
        self.position = end
        return data


def size_by_ranges(file: Ranges, offset: int, size: int) -> tuple[int, int]:
    """(width, height) in pixels of the picture at a byte range, turned upright by its orientation.

    An orientation behind the pixels of a PNG is not seen. Raises Refused for what no allowed format begins with and for
    animations.
    """
    part = Part(file, offset, size)
    start = part.read(12)
    part.seek(0)
    try:
        webp = start[:4] == b"RIFF" and start[8:] == b"WEBP"
        width, height, turned = webp_header(part) if webp else pillow_header(part)
    except (Refused, InputError):
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise Refused("unreadable_image", UNKNOWN) from error
    except Exception as error:  # a hostile file may raise anything inside a parser
        raise Refused("unreadable_image", f"{type(error).__name__}: {error}") from error
    return (height, width) if turned in SIDEWAYS else (width, height)


def pillow_header(part: Part) -> tuple[int, int, int]:
    """Width, height and orientation of a PNG or JPEG, of which Pillow reads no more than the header."""
    with Image.open(cast(IO[bytes], part), formats=["PNG", "JPEG"]) as picture:
        if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
            raise Refused("animated", f"{picture.n_frames} frames")  # type: ignore[attr-defined]
        return *picture.size, orientation(picture, header=True)


def webp_header(part: Part) -> tuple[int, int, int]:
    """Width, height and orientation of a WebP, of which Pillow would read everything (RFC 9649)."""
    head = part.read(30)
    if head[12:16] == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF, 1
    if head[12:16] == b"VP8L" and head[20:21] == b"\x2f":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    if head[12:16] != b"VP8X" or len(head) < 30:
        raise Refused("unreadable_image", f"a WebP that begins with {head[12:16]!r}")
    animated, described = head[20] & 0x02, head[20] & 0x0C  # 0x08: EXIF, 0x04: XMP
    if animated:
        raise Refused("animated", "an animated WebP")
    width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    return width, height, webp_orientation(part) if described else 1


def webp_orientation(part: Part) -> int:
    """The orientation in a WebP's EXIF or XMP chunk, which lie behind the pixels: found by the chunks' headers."""
    picture = Image.new("1", (1, 1))
    position = 12
    for _ in range(MAX_CHUNKS):
        part.seek(position)
        head = part.read(8)
        if len(head) < 8:
            break
        size = int.from_bytes(head[4:], "little")
        if name := {b"EXIF": "exif", b"XMP ": "xmp"}.get(head[:4]):
            picture.info.setdefault(name, part.read(size))
        position += 8 + size + size % 2
    return orientation(picture)
