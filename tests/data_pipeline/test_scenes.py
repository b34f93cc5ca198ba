"""The embedded world: exactness of the verifier, held-out splits, captions and edits that mean what they say."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from damage import blur, jpeg, noise

from data_pipeline.scenes import benchmark
from data_pipeline.scenes.captions import TASKS, Caption, Clause, describe, draw_scene, satisfied
from data_pipeline.scenes.edits import edit_success, kinds, preservation, random_edit
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.verifier import UNREADABLE, read
from data_pipeline.scenes.world import BACKGROUNDS, CELL, COLOURS, LEVELS, SHAPES, Object, Scene, parse, random_scene
from data_pipeline.sources import Scenes

EVERY_OBJECT = [
    Scene(level, (Object(cell, colour, shape, size),), background)
    for level, world in LEVELS.items()
    for colour, shape, size, background in itertools.product(COLOURS, SHAPES, world.sizes, world.backgrounds)
    for cell in (0, world.grid**2 - 1)
]


def some_scenes(level: int, count: int) -> list[Scene]:
    rng = random.Random(level)
    return [random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects)) for _ in range(count)]


def test_level_1_has_58848_scenes() -> None:
    cells, looks = 4, len(COLOURS) * len(SHAPES)
    count = sum(len(list(itertools.combinations(range(cells), n))) * looks**n for n in (1, 2, 3))
    assert count == 58_848


@pytest.mark.parametrize("damage", [np.asarray, noise, blur, jpeg])
def test_every_object_is_read_back_exactly(damage) -> None:
    for scene in EVERY_OBJECT:
        assert read(damage(render(scene)), scene.level).scene == scene


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("damage", [np.asarray, noise, blur, jpeg])
def test_scenes_are_read_back_exactly(damage, level: int) -> None:
    for scene in some_scenes(level, 60):
        assert read(damage(render(scene)), level).scene == scene


def spoil(scene: Scene, how: str) -> np.ndarray:
    """A rendered scene whose first object is malformed."""
    picture, o, grid = render(scene), scene.objects[0], LEVELS[scene.level].grid
    row, column = divmod(o.cell, grid)
    top, left = row * CELL, column * CELL
    background = BACKGROUNDS[scene.background]
    if how == "half":
        picture[top : top + CELL, left : left + CELL // 2] = background
    elif how == "hollow":
        picture[top + 13 : top + 19, left + 13 : left + 19] = background
    elif how == "speck":
        picture[top + 1 : top + 5, left + 1 : left + 5] = COLOURS[o.colour]
    elif how == "shifted":
        cell = picture[top : top + CELL, left : left + CELL].copy()
        picture[top : top + CELL, left : left + CELL] = np.roll(cell, 4, axis=1)
    elif how == "doubled":
        cell = picture[top : top + CELL, left : left + CELL].copy()
        ghost = np.roll(cell, 5, axis=0)
        mask = np.abs(ghost.astype(int) - background).max(-1) > 30
        cell[mask] = ghost[mask]
        picture[top : top + CELL, left : left + CELL] = cell
    return picture


@pytest.mark.parametrize("how", ["half", "hollow", "speck", "shifted", "doubled"])
def test_malformed_objects_are_unreadable(how: str) -> None:
    for scene in EVERY_OBJECT:
        reading = read(spoil(scene, how), scene.level)
        assert reading.scene is None
        assert reading.cells[scene.objects[0].cell] == UNREADABLE


def test_an_extra_or_misplaced_object_is_another_scene() -> None:
    for scene in some_scenes(1, 40):
        rng = random.Random(0)
        caption = describe(rng, scene, "position")
        assert satisfied(caption, read(render(scene), 1).scene)
        extra = scene.with_object(Object(scene.empty_cells()[0], "red", "circle"))
        assert not satisfied(caption, read(render(extra), 1).scene)
        if caption.relation is None:
            moved = scene.without(scene.objects[0]).with_object(
                Object(scene.empty_cells()[0], scene.objects[0].colour, scene.objects[0].shape)
            )
            assert not satisfied(caption, read(render(moved), 1).scene)


def test_a_picture_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(64, 64, 3\), got \(32, 32, 3\)"):
        read(np.zeros((32, 32, 3), np.uint8), 1)


def test_a_grey_or_black_picture_shows_nothing() -> None:
    for value in (0, 128):
        assert read(np.full((64, 64, 3), value, np.uint8), 1).scene is None


def test_canonical_text_is_invertible_and_orderless() -> None:
    for scene in some_scenes(2, 50):
        assert parse(scene.canonical) == scene
        assert Scene(2, tuple(reversed(scene.objects)), scene.background).canonical == scene.canonical
    with pytest.raises(ValueError, match="one object a cell"):
        Scene(1, (Object(0, "red", "circle"), Object(0, "blue", "circle")))


def test_one_scene_of_sixteen_is_held_out_and_single_objects_never() -> None:
    scenes = {s.canonical: s for s in some_scenes(1, 4000) if len(s.objects) > 1}
    share = sum(s.split == "val" for s in scenes.values()) / len(scenes)
    assert 0.045 < share < 0.08
    assert all(s.split == "train" for s in EVERY_OBJECT)


def test_records_never_show_a_held_out_scene_in_training() -> None:
    source = Scenes(1, 160, 160, 0)
    found = [record for unit in source.units(64) for record in source.read(unit)]
    assert {r.split for r in found} == {"train", "val"}
    for record in found:
        scenes = [parse(record.metadata[name]) for name in ("scene", "source") if name in record.metadata]
        assert {scene.split for scene in scenes} == {record.split}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_scene_satisfies_its_own_caption(level: int, task: str) -> None:
    rng = random.Random(level)
    texts = set()
    for _ in range(60):
        scene = draw_scene(rng, level, task)
        caption = describe(rng, scene, task)
        texts.add(caption.text.replace(caption.clauses[0].shape, "X"))
        assert caption.task == task
        assert satisfied(caption, scene)
        assert not satisfied(caption, None)
    assert len(texts) > 2


def test_counts_relations_and_colours_decide() -> None:
    two = Scene(1, (Object(0, "red", "circle"), Object(1, "blue", "square")))
    red, blue = Clause(1, "circle", "red"), Clause(1, "square", "blue")
    assert satisfied(Caption("", "position", (red, blue), "left of"), two)
    assert not satisfied(Caption("", "position", (red, blue), "right of"), two)
    assert not satisfied(Caption("", "position", (red, blue), "above"), two)
    assert not satisfied(Caption("", "color_attr", (Clause(1, "circle", "blue"), Clause(1, "square", "red"))), two)
    assert not satisfied(Caption("", "counting", (Clause(2, "circle"),)), two)


@pytest.mark.parametrize("level", LEVELS)
def test_every_kind_of_edit_succeeds_on_its_target_alone(level: int) -> None:
    rng, seen = random.Random(level), set()
    for _ in range(200):
        edit = random_edit(rng, level, "train")
        seen.add(edit.kind)
        done, undone = read(render(edit.target), level), read(render(edit.source), level)
        assert edit_success(edit, done) and preservation(edit, done) == 1.0
        assert edit_success(edit, undone) == (edit.kind == "keep")
        assert preservation(edit, undone) == 1.0
    assert seen == set(kinds(level))


def test_damage_elsewhere_fails_the_edit_and_lowers_preservation() -> None:
    rng = random.Random(0)
    edit = next(e for e in iter(lambda: random_edit(rng, 1, "train"), None) if e.kind == "recolour")
    cell = next(c for c in edit.untouched)
    row, column = divmod(cell, 2)
    picture = render(edit.target)
    picture[row * CELL + 8 : row * CELL + 24, column * CELL + 8 : column * CELL + 24] = (0, 0, 0)
    reading = read(picture, 1)
    assert not edit_success(edit, reading)
    assert preservation(edit, reading) == pytest.approx(1 - 1 / len(edit.untouched))


def test_the_benchmark_is_held_out_distinct_and_repeatable() -> None:
    captions, edits = benchmark(1, 64, 0)
    assert (captions, edits) == benchmark(1, 64, 0)
    assert len({(e.source.canonical, e.target.canonical) for e in edits}) == 64
    assert all(e.source.split == e.target.split == "val" for e in edits)
