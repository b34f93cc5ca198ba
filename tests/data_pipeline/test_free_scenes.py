"""Level 3: what is drawn is read back, what is damaged is not, and captions and edits mean what they say."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from damage import blur, jpeg, noise
from micro import micro_shards

from data_pipeline.datamodule import ShardDataModule
from data_pipeline.index import load_index, read_prompt
from data_pipeline.scenes.captions import TASKS
from data_pipeline.scenes.free.captions import SIDES, describe, draw_canvas, on_side, satisfied
from data_pipeline.scenes.free.edits import KINDS, draw_edit, edit_success, preservation, put, random_edit
from data_pipeline.scenes.free.verifier import read
from data_pipeline.scenes.free.world import (
    FORMATS,
    VISIBLE,
    Canvas,
    Placed,
    allowed,
    mask,
    parse,
    random_canvas,
    render,
    visible,
)
from data_pipeline.scenes.world import BACKGROUNDS, COLOURS

COUNT = 60


@cache
def canvases(count: int = COUNT, least: int = 1) -> list[Canvas]:
    rng = random.Random(4)
    return [random_canvas(rng, rng.randint(least, 4)) for _ in range(count)]


@pytest.mark.parametrize("change", [np.asarray, noise, blur, jpeg])
def test_what_is_drawn_is_read_back(change) -> None:
    for canvas in canvases():
        found = read(change(render(canvas)))
        assert found is not None and found.canonical == canvas.canonical


def test_formats_are_multiples_of_32_and_objects_show_enough() -> None:
    assert all(side % 32 == 0 for size in FORMATS for side in size) and any(h != w for h, w in FORMATS)
    seen = canvases(300)
    assert {(c.height, c.width) for c in seen} == set(FORMATS)
    shares = [share for canvas in seen for share in visible(canvas)]
    assert min(shares) >= VISIBLE and min(shares) < 0.8 and sum(share < 1 for share in shares) > 50


def test_the_canonical_text_is_one_for_equal_pictures_and_parses() -> None:
    for canvas in canvases():
        again = parse(canvas.canonical)
        assert again.canonical == canvas.canonical and np.array_equal(render(again), render(canvas))
    apart = Canvas(96, 96, (Placed(0, 0, "red", "circle", "small"), Placed(60, 60, "blue", "square", "large")))
    assert replace(apart, objects=apart.objects[::-1]).canonical == apart.canonical
    splits = [canvas.split for canvas in canvases(300, 2)]
    assert 5 < splits.count("val") < 40


def damaged(canvas: Canvas, how: str) -> np.ndarray:
    """The picture with its front object spoiled."""
    picture, o = render(canvas).astype(float), canvas.objects[-1]
    share = mask(o, canvas.height, canvas.width)
    ys, xs = np.nonzero(share > 0.5)
    ground = np.array(BACKGROUNDS[canvas.background], float)
    if how == "half":
        picture[(share > 0) & (np.arange(canvas.width) > xs.mean())] = ground
    elif how == "hollow":
        y, x = int(ys.mean()), int(xs.mean())
        picture[y - 3 : y + 4, x - 3 : x + 4] = ground
    elif how == "speck":
        picture[2:8, 2:8] = COLOURS["purple" if canvas.objects[0].colour != "purple" else "green"]
    elif how == "blended":
        picture[share > 0] = 0.3 * picture[share > 0] + 0.7 * ground
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", ["half", "hollow", "speck", "blended"])
def test_what_is_damaged_is_no_scene_and_never_the_one_it_was(how: str) -> None:
    rng = random.Random(2)
    for _ in range(20):
        canvas = random_canvas(rng, rng.randint(1, 3))
        while any(o.x < 12 and o.y < 12 for o in canvas.objects):  # the speck's corner
            canvas = random_canvas(rng, rng.randint(1, 3))
        found = read(damaged(canvas, how))
        assert found is None or found.canonical != canvas.canonical


def test_more_fewer_or_moved_objects_are_another_scene() -> None:
    rng = random.Random(5)
    for _ in range(15):
        canvas = random_canvas(rng, 2)
        o = canvas.objects[-1]
        moved = canvas.swapped(o, replace(o, x=o.x + 5))
        assert read(render(canvas.without(o))).canonical != canvas.canonical
        assert not allowed(moved) or read(render(moved)).canonical == moved.canonical != canvas.canonical


def test_noise_and_flat_pictures_are_no_scene_of_objects() -> None:
    rng = np.random.default_rng(0)
    assert read(rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)) is None
    assert read(np.full((64, 96, 3), 90, np.uint8)) is None
    assert read(np.full((64, 96, 3), 245, np.uint8)).objects == ()


@pytest.mark.parametrize("task", TASKS)
def test_captions_hold_for_their_canvas_and_not_with_an_object_more_or_less(task: str) -> None:
    rng = random.Random(task)
    for _ in range(40):
        canvas = draw_canvas(rng, task)
        caption = describe(rng, canvas, task)
        assert satisfied(caption, canvas) and satisfied(caption, parse(canvas.canonical))
        assert not satisfied(caption, canvas.without(canvas.objects[0])) and not satisfied(caption, None)
        if (more := put(rng, canvas, canvas.objects[0], rng.choice(list(SIDES)))) is not None:
            assert not satisfied(caption, more[0])


def test_sides_and_relations_are_judged() -> None:
    rng, refused = random.Random(1), 0
    for _ in range(60):
        canvas = draw_canvas(rng, "position")
        caption = describe(rng, canvas, "position")
        turned = replace(
            canvas,
            objects=tuple(replace(o, x=canvas.width - 32 - o.x, y=canvas.height - 32 - o.y) for o in canvas.objects),
        )
        refused += not satisfied(caption, turned)
    assert refused > 40  # what names no place, or holds either way, stays true


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_succeeds_on_its_target_and_not_on_its_source(kind: str) -> None:
    rng, made = random.Random(kind), 0
    while made < 25:
        edit = draw_edit(rng, random_canvas(rng, rng.randint(1, 4)), kind)
        if edit is None:
            continue
        made += 1
        assert allowed(edit.target) and edit.sources[0].background
        assert edit_success(edit, edit.target) and preservation(edit, edit.target) == 1.0
        assert edit_success(edit, edit.sources[0]) == (kind == "keep") and not edit_success(edit, None)
        assert len(edit.sources) == (2 if kind == "combine" else 1)
        if edit.placed is not None:
            assert on_side(edit.target, edit.placed, edit.side, 1 / 3)
            elsewhere = put(rng, edit.target.without(edit.placed), edit.placed, edit.side)
            assert elsewhere is None or edit_success(edit, elsewhere[0])
            opposite = next(s for s, (axis, d) in SIDES.items() if (axis, -d) == SIDES[edit.side])
            wrong = put(rng, edit.target.without(edit.placed), edit.placed, opposite)
            assert wrong is None or not edit_success(edit, wrong[0])


def test_edits_stay_on_their_side_of_the_split() -> None:
    rng = random.Random(0)
    for split in ("train", "val"):
        for _ in range(15):
            edit = random_edit(rng, split)
            assert edit.sources[0].split == edit.target.split == split


def test_shards_of_level_3_serve_buckets_of_all_formats_and_several_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = micro_shards(tmp_path / "shards", 60, 160, level=3)
    records = {record.key: record for record in load_index(shards)}
    data = ShardDataModule([str(shards)], batch_size=2, image_size=128, size_multiple=32, steps=60)
    data.setup("fit")
    assert set(data.ratio) == {"text_to_image", "edit", "multi_reference"}
    shapes, several = set(), 0
    for batch in data.train_dataloader():
        shapes.add(tuple(batch.target.shape[-2:]))
        for i, key in enumerate(batch.keys):
            assert batch.prompts[i] == read_prompt(records[key])
            sources = sum(name.startswith("source") for name in records[key].members)
            assert sources == (0 if batch.references is None else len(batch.references[i]))
            several += sources == 2
    assert len(shapes) >= 4 and several > 20
