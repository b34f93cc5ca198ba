"""Geometry of what is trained on: nothing is shifted, swapped or squashed, whatever way a picture was stored."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.batches import ImageBatch
from data_pipeline.dataset import PlannedDataset, load_pixels
from data_pipeline.index import IndexedRecord
from data_pipeline.plan import Draw, PlannedBatch
from data_pipeline.recipe import Recipe
from data_pipeline.regroup import Rule
from data_pipeline.serving import ServingIndex, build
from data_pipeline.sources import Manifest
from data_pipeline.transforms import Size, decode, fit_sizes, to_tensor


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with detail of ten pixels and more, and no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [
        a * np.sin(2 * np.pi * (fx * x + fy * y) + p)
        for a, fx, fy, p in rng.uniform([9, -12, -12, 0], [25, 12, 12, 6], (12, 4))
    ]
    planes = [128 + np.sum(waves[i::3], 0) for i in range(3)]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def stored(pixels: np.ndarray, form: str, orientation: int = 1) -> bytes:
    """A file that shows `pixels` when its orientation is honoured."""
    undo = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    picture = Image.fromarray(pixels)
    if undo[orientation] is not None:
        picture = picture.transpose(undo[orientation])
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    picture.save(buffer, form, exif=exif, **({"quality": 97, "subsampling": 0} if form == "JPEG" else {}))
    return buffer.getvalue()


def trained(data: bytes, size: Size) -> torch.Tensor:
    return to_tensor(decode(data, size), size)


def shift_between(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """How far b lies below and right of a, in pixels, by the phase of their lowest frequencies."""
    found = []
    for axis in (-2, -1):
        lines = [np.asarray(t.mean(0).mean(-1 if axis == -2 else -2)) for t in (a, b)]
        gradient = np.gradient(lines[0])
        found.append(float(-(gradient * (lines[1] - lines[0])).sum() / (gradient**2).sum()))
    return found[0], found[1]


SIZES = [((1024, 1024), (512, 512)), ((1023, 769), (512, 384)), ((2050, 1025), (512, 256)), ((700, 900), (400, 512))]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("full", "size"), SIZES)
def test_a_jpeg_decoded_at_a_fraction_lies_where_a_png_does(full: Size, size: Size, orientation: int) -> None:
    pixels = smooth(*full)
    png, jpeg = (trained(stored(pixels, form, orientation), size) for form in ("PNG", "JPEG"))
    assert png.shape == jpeg.shape == (3, *size)
    assert (png - jpeg).abs().max() < 0.12
    assert max(map(abs, shift_between(png, jpeg))) < 0.1


def test_the_measure_sees_a_pixel() -> None:
    pixels = trained(stored(smooth(1024, 1024), "PNG"), (512, 512))
    down, right = shift_between(pixels, pixels.roll(1, 1))
    assert down == pytest.approx(1, abs=0.1) and right == pytest.approx(0, abs=0.1)
    down, right = shift_between(pixels, pixels.roll(1, 2))
    assert right == pytest.approx(1, abs=0.1) and down == pytest.approx(0, abs=0.1)


def served(folder: Path, data: bytes, extension: str) -> ImageBatch:
    """An edit whose source and target are one file, through shard, index and dataset."""
    folder.mkdir()
    for name in ("source", "target"):
        (folder / f"{name}.{extension}").write_bytes(data)
    row = {"source": f"source.{extension}", "target": f"target.{extension}", "instruction": "change nothing"}
    (folder / "edits.jsonl").write_text(json.dumps(row))
    Recipe(Manifest(str(folder / "edits.jsonl"), "edit")).build(folder / "shards")
    index = ServingIndex(build(folder / "index", {"": [str(folder / "shards")]}, Rule(512, 32, 0.0)))
    ((stream, _),) = index.streams["train"].items()
    return PlannedDataset([index], "train")[PlannedBatch((Draw(stream, 0, 0),))]


def defects(batch: ImageBatch, pixels: np.ndarray) -> list[str]:
    """What is wrong with an identity edit of these pixels, (600, 800, 3), trained at 384 x 512."""
    target, source = batch.target[0], batch.references[0, 0]
    if target.shape != (3, 384, 512):
        return ["shape"]
    plain = to_tensor(Image.fromarray(pixels), (384, 512))
    return [
        *(["source differs from target"] if not torch.equal(source, target) else []),
        *(["shifted"] if max(abs(n) for t in (source, target) for n in shift_between(plain, t)) > 0.1 else []),
        *(["other pixels"] if (target - plain).abs().mean() > 0.03 else []),
    ]


FORMS = [("PNG", "png", 1), ("JPEG", "jpg", 1), ("JPEG", "jpg", 6), ("WEBP", "webp", 1)]


@pytest.mark.parametrize(("form", "extension", "orientation"), FORMS)
def test_an_identity_edit_round_trips(tmp_path: Path, form: str, extension: str, orientation: int) -> None:
    pixels = smooth(600, 800)
    assert not defects(served(tmp_path / "a", stored(pixels, form, orientation), extension), pixels)
    exact = smooth(384, 512)
    batch = served(tmp_path / "b", stored(exact, "PNG"), "png")
    assert torch.equal(batch.target[0], torch.from_numpy(exact).permute(2, 0, 1) / 127.5 - 1)


def swapped(sizes: np.ndarray, *rule: Any) -> np.ndarray:
    return fit_sizes(sizes, *rule)[:, ::-1]


def transposed(picture: Image.Image, size: Size) -> torch.Tensor:
    return to_tensor(picture.transpose(Image.Transpose.TRANSPOSE), size)


def shifted(picture: Image.Image, size: Size) -> torch.Tensor:
    return to_tensor(picture, size).roll(1, -1)


def source_shifted(record: IndexedRecord, name: str, *rest: Any) -> torch.Tensor:
    return load_pixels(record, name, *rest).roll(int(name == "source0"), 1)


@pytest.mark.parametrize(
    ("place", "defect", "expected"),
    [
        ("data_pipeline.regroup.fit_sizes", swapped, "shape"),
        ("data_pipeline.dataset.to_tensor", transposed, "other pixels"),
        ("data_pipeline.dataset.to_tensor", shifted, "shifted"),
        ("data_pipeline.dataset.load_pixels", source_shifted, "source differs from target"),
    ],
)
def test_swapped_sides_and_a_shift_of_one_pixel_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, defect: Callable, expected: str
) -> None:
    monkeypatch.setattr(place, defect)
    pixels = smooth(600, 800)
    assert expected in defects(served(tmp_path / "a", stored(pixels, "PNG"), "png"), pixels)


@pytest.mark.parametrize("fraction", [1, 2, 4, 8])
def test_corners_stay_corners(fraction: int) -> None:
    side = 64 * fraction
    pixels = np.zeros((side, 2 * side, 3), np.uint8)
    for colour, y, x in (((255, 0, 0), 0, 0), ((0, 255, 0), 0, 1), ((0, 0, 255), 1, 0), ((255, 255, 0), 1, 1)):
        half = np.s_[y * side // 2 : (y + 1) * side // 2, x * side : (x + 1) * side]
        pixels[half] = colour
    for orientation in (1, 3, 6, 8):
        found = trained(stored(pixels, "JPEG", orientation), (64, 128))
        for colour, y, x in (((1, -1, -1), 0, 0), ((-1, 1, -1), 0, -1), ((-1, -1, 1), -1, 0), ((1, 1, -1), -1, -1)):
            assert torch.allclose(found[:, y, x], torch.tensor(colour, dtype=torch.float32), atol=0.1)
        swapped = trained(stored(pixels, "JPEG", orientation), (128, 64))
        assert swapped.shape == (3, 128, 64)
