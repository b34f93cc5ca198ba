"""Resized pictures: the size asked for, the pixels of an exact average, upright, on white; others keep their bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.records import EditRecord, EncodedImage, Record, Rejected, TextImageRecord
from data_pipeline.steps.decode import Decode
from data_pipeline.steps.resize import Resize
from data_pipeline.transforms import decode


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Texture at all scales, as photographs have it: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum / frequency[..., None] ** 1.4, (height, width), axes=(0, 1))
    return np.clip(128 + 40 * field / field.std(), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = "JPEG", **options: object) -> EncodedImage:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return EncodedImage(buffer.getvalue(), {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form])


def resized(step: Resize, image: EncodedImage) -> EncodedImage:
    found = step.check(image)
    assert isinstance(found, EncodedImage), found
    return found


def area(pixels: np.ndarray, size: int) -> np.ndarray:
    """The first axis averaged to `size` over exact, fractional areas."""
    total = np.concatenate([np.zeros_like(pixels[:1], float), np.cumsum(pixels, 0, dtype=float)])
    edges = np.linspace(0, len(pixels), size + 1)
    whole = np.minimum(edges.astype(int), len(pixels) - 1)
    part = (edges - whole)[:, None, None]
    return np.diff(total[whole] + part * pixels[whole], axis=0) * size / len(pixels)


@pytest.mark.parametrize(
    ("step", "size", "expected"),
    [
        (Resize(longer_side=64), (256, 192), (64, 48)),
        (Resize(longer_side=64), (192, 256), (48, 64)),
        (Resize(shorter_side=64), (256, 192), (85, 64)),
        (Resize(longer_side=100), (256, 192), (100, 75)),
        (Resize(longer_side=300, only_shrink=False), (256, 192), (300, 225)),
    ],
)
def test_sides_are_those_asked_for(step: Resize, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert decode(resized(step, encoded(smooth(*size))).data).size == expected


@pytest.mark.parametrize("side", [32, 50, 64, 100, 128, 160, 200, 230])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pixels_are_averages_over_area(side: int, form: str) -> None:
    image = encoded(smooth(256, 192), form, **({"quality": 95} if form == "JPEG" else {}))
    found = np.asarray(decode(resized(Resize(longer_side=side, format="png"), image).data), float)
    height, width, _ = found.shape
    exact = area(area(np.asarray(decode(image.data)), height).swapaxes(0, 1), width).swapaxes(0, 1)
    assert 10 * np.log10(255**2 / np.mean((found - exact) ** 2)) >= 38


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("step", [Resize(longer_side=64), Resize(longer_side=99), Resize(shorter_side=48)])
def test_a_picture_that_fits_keeps_its_bytes(form: str, step: Resize) -> None:
    image = encoded(smooth(64, 48), form)
    assert resized(step, image) == image


def test_equal_input_gives_equal_bytes_and_quality_is_heeded() -> None:
    image = encoded(smooth(200, 200))
    once, again, coarse = (resized(Resize(longer_side=90, quality=q), image) for q in (95, 95, 50))
    assert once == again and len(coarse.data) < len(once.data)


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_the_format_asked_for_is_written_with_nothing_attached(form: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image = encoded(smooth(64, 64), "PNG", icc_profile=b"p" * 200, exif=exif)
    found = resized(Resize(longer_side=32, format=form), image)
    assert found.extension == form
    with Image.open(io.BytesIO(found.data)) as opened:
        assert not opened.getexif() and "icc_profile" not in opened.info


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_stored_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(smooth(128, 96), form, exif=exif)
    expected = decode(image.data)
    found = decode(resized(Resize(longer_side=64, format="png"), image).data)
    assert found.size == (expected.width // 2, expected.height // 2)
    assert np.abs(np.asarray(found, float) - np.asarray(expected.reduce(2), float)).mean() < 3


def test_what_is_transparent_becomes_white() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 32:, 3] = 255
    found = np.asarray(decode(resized(Resize(longer_side=32, format="png"), encoded(pixels, "PNG")).data))
    assert (found[:, :16] == 255).all() and (found[:, 16:] == 0).all()


def test_sixteen_bits_of_grey_keep_their_range() -> None:
    pixels = np.repeat(np.arange(0, 65536, 1024, dtype=np.uint16)[None], 64, 0)
    found = np.asarray(decode(resized(Resize(longer_side=32, format="png"), encoded(pixels, "PNG")).data))
    assert np.abs(found[0, :, 0].astype(int) - (np.arange(32) * 8 + 2)).max() <= 1


def test_all_pictures_of_an_edit_follow_one_rule() -> None:
    source, small, target = (encoded(smooth(*size)) for size in ((128, 96), (60, 40), (256, 128)))
    record = Resize(longer_side=64)(EditRecord("k", (source, small), target, " blue "))
    assert isinstance(record, EditRecord)
    sizes = [decode(image.data).size for image in record.images.values()]
    assert sizes == [(64, 48), (60, 40), (64, 32)] and record.sources[1] == small


def refused(step: Resize, data: bytes) -> str:
    found: Record | Rejected = step(TextImageRecord("k", EncodedImage(data, "jpg"), "words"))
    assert isinstance(found, Rejected) and found.key == "k" and found.detail.startswith("image: ")
    return found.reason


# The limits are Decode's: what it refuses, so does Resize, at whatever scale it would have decoded.
@pytest.mark.parametrize("step", [Resize(longer_side=32), Resize(longer_side=999), Resize(shorter_side=16)])
def test_hostile_bytes_are_refused_as_decode_refuses_them(step: Resize) -> None:
    good = encoded(smooth(128, 96)).data
    blank, animated = io.BytesIO(), io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(blank, "PNG")
    Image.new("RGB", (64, 64)).save(animated, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    listed = [good[: len(good) // 2], good[:30], b"", b"<html>", blank.getvalue(), animated.getvalue()]
    listed += [encoded(smooth(128, 96), form).data[:-200] for form in ("PNG", "WEBP")]
    for data in listed:
        found = Decode().check(EncodedImage(data, "jpg"))
        assert isinstance(found, tuple) and refused(step, data) == found[0]
    assert refused(Resize(longer_side=32, max_pixels=1000), good) == "too_many_pixels"
    assert refused(Resize(longer_side=32), encoded(smooth(256, 16)).data) == "too_small"
    assert refused(Resize(shorter_side=999, only_shrink=False, max_pixels=500_000), good) == "too_many_pixels"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "set one of them"),
        ({"longer_side": 8, "shorter_side": 8}, "set one of them"),
        ({"longer_side": -8}, "set one of them"),
        ({"longer_side": 8, "quality": 0}, "quality 1 to 100"),
        ({"longer_side": 8, "format": "gif"}, "expected png, jpg, webp"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(settings: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Resize(**settings)
