"""Score steps: exact numbers by hand, nulls where nothing can be measured, batches equal to their singles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import InputError
from data_pipeline.executors.task import score_columns
from data_pipeline.index import with_scores
from data_pipeline.records import EditRecord, EncodedImage, PreferenceRecord, PromptRecord, Record, TextImageRecord
from data_pipeline.steps.fingerprints import Fingerprint, phash
from data_pipeline.steps.metadata import Metadata
from data_pipeline.steps.pixels import pixels
from data_pipeline.steps.quality import Change, Quality, change_mask, entropy, sharpness
from data_pipeline.steps.similarity import Aesthetic, Consistency, Similarity

RNG = np.random.default_rng(0)


def png(array: np.ndarray) -> EncodedImage:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), "png")


def smooth(side: int = 64) -> np.ndarray:
    """A picture with content at low frequencies."""
    small = Image.fromarray(RNG.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def flat(value: Sequence[int], height: int = 20, width: int = 10) -> np.ndarray:
    return np.broadcast_to(np.array(value, np.uint8), (height, width, 3))


def edit(source: np.ndarray, target: np.ndarray, **metadata: Any) -> EditRecord:
    return EditRecord("e", (png(source),), png(target), "do it", metadata=metadata)


PROMPT = PromptRecord("p", "three words here")


def test_quality_by_hand() -> None:
    half = flat([0, 0, 0], 20, 10).copy()
    half[:, 5:] = 255
    found = Quality().score([TextImageRecord("a", png(half), "a b"), PROMPT])
    assert found[0] == {
        "min_side": 10,
        "aspect": 2.0,
        "sharpness": pytest.approx(2 * 255**2 / 8, rel=1e-5),  # of 8 inner columns two see the edge, +255 and -255
        "information": pytest.approx(1.0),
        "brightness": pytest.approx(0.5),
        "words": 2,
    }
    assert found[1] == {**dict.fromkeys(found[0]), "words": 3}


def test_blur_lowers_sharpness_and_a_flat_picture_has_none() -> None:
    picture = Image.fromarray(RNG.integers(0, 255, (64, 64), dtype=np.uint8))
    values = [sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(r)), np.float32)) for r in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert sharpness(np.full((9, 9), 7, np.float32)) == entropy(np.full((9, 9), 7, np.float32)) == 0
    assert entropy(np.arange(256, dtype=np.float32)[None]) == 8


def test_change_by_hand() -> None:
    source, target = flat([100, 100, 100], 30, 20), flat([100, 100, 100], 30, 20).copy()
    target[10:16, 5:13] = [100, 200, 100]
    found = Change().score([edit(source, target), edit(source, source), PROMPT])
    # the 3 x 3 mean is above 16 from two changed pixels of nine on: the rectangle and a ring but for its corners
    assert found[0]["changed"] == pytest.approx((8 * 10 - 4) / 600)
    assert found[0]["change_box"] == pytest.approx(8 * 10 / 600)
    assert found[0]["change"] == pytest.approx(48 * 100 / 255 / (600 * 3))
    assert found[1] == {"changed": 0, "change": 0, "change_box": 0}
    assert set(found[2].values()) == {None}


def test_a_difference_of_one_is_one_and_not_its_wrap_around() -> None:
    brighter, darker = flat([101] * 3), flat([100] * 3)
    for pair in ((brighter, darker), (darker, brighter)):
        assert Change().score([edit(*pair)])[0]["change"] == pytest.approx(1 / 255)
        assert not change_mask(*pair, threshold=16).any()


def test_a_target_of_another_size_is_compared_at_the_smaller_one() -> None:
    picture = smooth(64)
    larger = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BICUBIC))
    assert Change().score([edit(picture, larger)])[0]["changed"] < 0.01


def test_a_fingerprint_survives_size_and_compression_and_tells_pictures_apart() -> None:
    pictures = [smooth(96) for _ in range(30)]
    prints = [phash(picture) for picture in pictures]
    for picture, own in zip(pictures, prints, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).resize((70, 70)).save(buffer, "JPEG", quality=70)
        assert bits(own, phash(np.asarray(Image.open(buffer)))) <= 4
    apart = [bits(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    assert min(apart) > 8 and abs(np.mean(apart) - 32) < 2
    assert Fingerprint().score([PROMPT]) == [{"phash": None, "phash_others": []}]


def test_every_picture_of_a_record_has_its_fingerprint() -> None:
    first, second, target = (smooth(64) for _ in range(3))
    records = [
        EditRecord("e", (png(first), png(second)), png(target), "mix"),
        PreferenceRecord("p", "x", png(target), png(first), (png(second),)),
    ]
    edited, preferred = Fingerprint().score(records)
    assert edited == {"phash": phash(target), "phash_others": [phash(first), phash(second)]}
    assert preferred == {"phash": phash(target), "phash_others": [phash(second), phash(first)]}


def bits(a: int, b: int) -> int:
    return (a ^ b).bit_count() if (a ^ b) >= 0 else ((a ^ b) & (1 << 64) - 1).bit_count()


def test_pictures_are_looked_at_upright_and_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert pixels(EncodedImage(buffer.getvalue(), "jpg")).shape == (40, 20, 3)
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(buffer, "PNG")
    assert (pixels(EncodedImage(buffer.getvalue(), "png")) == 255).all()


@dataclass
class MeanColour:
    """An embedding that can be computed by hand: the direction of the mean colour, or of a colour's name."""

    fingerprint = "mean colour"
    names = ("red", "green", "blue")

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return unit(np.stack([picture.mean((0, 1)) for picture in pictures]))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.array([[name in text for name in self.names] for text in texts], np.float32))

    def rate(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([picture.mean() for picture in pictures], np.float32)

    def maps(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.abs(a.astype(np.float32) - b).mean(-1) for a, b in zip(first, second, strict=True)]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


RED, GREEN = flat([200, 0, 0]), flat([0, 100, 0])


def test_similarities_by_hand() -> None:
    captions = {"source_caption": "red", "target_caption": "green"}
    records: list[Record] = [
        TextImageRecord("a", png(RED), "red and green"),
        edit(RED, GREEN, **captions),
        edit(RED, GREEN),
        edit(RED, RED, **captions),
        PROMPT,
    ]
    found = [tuple(row.values()) for row in Similarity(MeanColour()).score(records)]
    close = pytest.approx
    assert found[0] == (close(np.sqrt(0.5)), None, None)
    assert found[1] == (close(1), close(0), close(1))
    assert found[2] == (None, close(0), None)
    assert found[3] == (close(0), close(1), None)  # no step between pictures has no direction
    assert found[4] == (None, None, None)


def test_ratings_and_consistency_by_hand() -> None:
    target = RED.copy()
    target[:10] = [0, 0, 0]
    target[15:] = [203, 0, 0]  # drift that is too faint to count as a change
    rows = Aesthetic(MeanColour()).score([TextImageRecord("a", png(RED), "x"), edit(GREEN, RED), PROMPT])
    assert [row["aesthetic"] for row in rows] == [pytest.approx(200 / 3), pytest.approx(200 / 3), None]
    (row, none) = Consistency(MeanColour()).score([edit(RED, target), PROMPT])
    assert row["distance"] == pytest.approx((10 * 200 + 5 * 3) / 20 / 3)
    assert row["distance_outside"] == pytest.approx(5 * 3 / 9 / 3)  # row 10 touches the change, rows 11 to 19 do not
    assert set(none.values()) == {None}


def test_metadata_becomes_columns_of_its_kind() -> None:
    step = Metadata({"task": "text", "o_score": "number"})
    facts: list[dict[str, Any]] = [{"task": "swap", "o_score": "8.5"}, {"task": 3, "o_score": 9}, {}]
    records = [edit(RED, GREEN, **each) for each in facts]
    assert [tuple(row.values()) for row in step.score(records)] == [("swap", 8.5), ("3", 9.0), (None, None)]
    odd = edit(RED, GREEN, task=["a"], o_score="nan")
    assert [tuple(row.values()) for row in step.score([odd])] == [(None, None)]
    with pytest.raises(InputError, match="names of metadata"):
        Metadata({"a task": "text"})


def test_two_scorers_of_a_kind_stand_side_by_side() -> None:
    model = MeanColour()
    steps = [
        *(Consistency(model), Consistency(model, name="features"), Similarity(model), Similarity(model, name="dino")),
        *(Aesthetic(model), Aesthetic(model, name="style")),
    ]
    names = [field.name for field in with_scores(score_columns(steps))]
    assert {"distance_outside", "features_outside", "clip_image", "dino_image", "aesthetic", "style"} <= set(names)
    for step in steps:
        (row,) = step.score([edit(RED, GREEN)])
        assert set(row) == {field.name for field in step.columns()}


STEPS = [
    Quality(),
    Change(),
    Fingerprint(),
    Similarity(MeanColour()),
    Aesthetic(MeanColour()),
    Consistency(MeanColour()),
    Metadata({"task": "text"}),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_batch_equals_its_singles_and_fits_its_columns(step) -> None:
    records = [edit(smooth(), smooth()), PROMPT, TextImageRecord("a", png(smooth(40)), "red"), edit(RED, GREEN)]
    whole = step.score(records)
    assert whole == [row for record in records for row in step.score([record])]
    schema = pa.schema(step.columns())
    assert pa.Table.from_pylist(whole, schema=schema).num_rows == 4 and set(whole[0]) == set(schema.names)
    assert all({b"scorer", b"revision"} <= field.metadata.keys() for field in schema)
