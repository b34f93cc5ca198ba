"""Sizes of pictures from their first bytes: those of the whole picture, for little, or a named refusal."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.headers import MAX_HEADER, Ranges, Refused, size_by_ranges
from data_pipeline.shards import upright_size


def encoded(size: tuple[int, int] = (40, 24), form: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def turned(form: str, orientation: int = 6, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded((40, 24), form, exif=exif, **options)


def phone() -> bytes:
    frame, buffer = Image.new("RGB", (40, 24), "red"), io.BytesIO()
    frame.save(buffer, "MPO", save_all=True, append_images=[frame])
    return buffer.getvalue()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
PICTURES = {
    "JPEG": encoded(),
    "progressive JPEG": encoded(progressive=True),
    "JPEG with a long profile": encoded(icc_profile=os.urandom(300_000)),
    "turned JPEG": turned("JPEG"),
    "phone": phone(),
    "PNG": encoded(form="PNG"),
    "turned PNG": turned("PNG"),
    "WebP": encoded(form="WEBP"),
    "lossless WebP": encoded(form="WEBP", lossless=True),
    "turned WebP": turned("WEBP"),
    "WebP turned half": turned("WEBP", 3, lossless=True),
    "WebP turned by XMP": encoded(form="WEBP", xmp=XMP),
    "WebP with a profile": encoded(form="WEBP", icc_profile=b"p" * 501),
}


@pytest.mark.parametrize("name", PICTURES)
def test_sizes_by_ranges_are_those_of_the_whole_picture(name: str) -> None:
    data = b"x" * 1000 + PICTURES[name] + b"y" * 1000
    file = Ranges(lambda start, end: data[start:end], len(data))
    size = size_by_ranges(file, 1000, len(PICTURES[name]))
    assert size == upright_size(PICTURES[name]) and sorted(size) == [24, 40]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_of_a_large_picture_a_window_is_read(form: str) -> None:
    data = encoded((1200, 900), form)
    file = Ranges(lambda start, end: data[start:end], len(data))
    assert size_by_ranges(file, 0, len(data)) == (1200, 900) and file.taken <= 4096 < len(data) / 20


def test_a_picture_whose_size_hides_behind_megabytes_and_an_animation_are_refused() -> None:
    hidden = b"\x89PNG\r\n\x1a\n" + (1 << 30).to_bytes(4, "big") + b"abcd"
    file = Ranges(lambda start, end: (hidden + bytes(end))[start:end], 1 << 31)
    with pytest.raises(Refused) as refused:
        size_by_ranges(file, 0, 1 << 31)
    assert refused.value.reason == "unreadable_image" and file.taken <= MAX_HEADER + 4096
    other = Image.new("RGB", (40, 24))
    for form in ("PNG", "WEBP"):
        data = encoded(form=form, save_all=True, append_images=[other])
        with pytest.raises(Refused) as refused:
            size_by_ranges(Ranges(lambda start, end, data=data: data[start:end], len(data)), 0, len(data))
        assert refused.value.reason == "animated"


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd headers
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PICTURES)), st.integers(0, 400), st.integers(0, 255))
def test_damaged_headers_give_a_size_or_a_refusal(name: str, at: int, value: int) -> None:
    data = bytearray(PICTURES[name])
    data[at % len(data)] = value
    file = Ranges(lambda start, end: bytes(data[start:end]), len(data))
    try:
        size = size_by_ranges(file, 0, len(data))
    except Refused as refused:
        assert refused.reason in ("unreadable_image", "too_many_pixels", "animated")
    else:
        assert len(size) == 2 and all(isinstance(side, int) for side in size)
