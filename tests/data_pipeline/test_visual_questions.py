"""Questions about scenes: each has one right answer, which the scene itself confirms."""

from __future__ import annotations

import random

import pytest

from data_pipeline.scenes import visual_questions
from data_pipeline.scenes.captions import NUMBERS, TASKS, random_caption
from data_pipeline.scenes.edits import random_edit
from data_pipeline.scenes.visual_questions import (
    ABOUT,
    KINDS,
    NOTHING,
    Question,
    ask,
    listing,
    random_question,
    wanted,
)
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Object, Scene, parse

SCENE = Scene(1, (Object(0, "red", "circle"), Object(3, "red", "square")))


def test_answers_by_hand() -> None:
    found = {(q.text, q.answer) for kind in ABOUT for i in range(300) for q in [ask(random.Random(i), SCENE, kind)]}
    assert {
        ("Describe the picture.", "top left red circle, bottom right red square"),
        ("What is in the top right?", NOTHING),
        ("What is in the bottom right?", "red square"),
        ("How many red objects are there?", "two"),
        ("How many crosses are there?", "zero"),
        ("Is there a red circle?", "yes"),
        ("Is there a blue circle?", "no"),
    } <= found
    assert all(len({a for t, a in found if t == text}) == 1 for text, _ in found)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_kind_is_of_its_split(level: int, split: str) -> None:
    rng = random.Random(0)
    for kind in KINDS:
        found = random_question(rng, level, split, kind)
        assert found.kind == kind and found.answer
        assert found.scene is None if kind == "plan" else found.scene.split == split


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_placed_caption_wants_is_its_scene(level: int) -> None:
    rng = random.Random(2)
    for _ in range(100):
        scene, caption = random_caption(rng, level, "train", {"position": 1})
        if caption.relation is None:
            assert wanted(caption, level) == listing(scene)
        else:
            assert f" {caption.relation} " in wanted(caption, level)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_caption_wants_names_every_object(task: str) -> None:
    scene, caption = random_caption(random.Random(task), 1, "train", {task: 1})
    words = wanted(caption, 1).replace(",", "").split()
    assert sorted(w for w in words if w in SHAPES) == sorted(o.shape for o in scene.objects)
    if task in ("color_attr", "colors", "position"):
        assert sorted(w for w in words if w in COLOURS) == sorted(o.colour for o in scene.objects)


def done(source: Scene, instruction: str) -> Scene:
    """An instruction that names every object by its cell, done by reading its words."""
    names = list(LEVELS[1].cell_names)
    cells = [i for i in sorted(range(4), key=lambda i: instruction.find(names[i])) if names[i] in instruction]
    words = instruction.split()
    if instruction == NOTHING:
        return source
    if words[0] == "add":
        return source.with_object(Object(cells[0], words[2], words[3]))
    rest = source.without(source.at(cells[0]))
    if words[0] == "remove":
        return rest
    if words[0] == "make":
        return rest.with_object(Object(cells[0], words[-1], source.at(cells[0]).shape))
    if words[0] == "replace":
        return rest.with_object(Object(cells[0], words[-2], words[-1]))
    old = source.at(cells[0])
    return rest.with_object(Object(cells[1], old.colour, old.shape))


def test_the_wording_of_an_edit_leads_to_its_target() -> None:
    rng = random.Random(0)
    for _ in range(200):
        edit = random_edit(rng, 1, "train")
        assert done(edit.source, visual_questions.instruction(edit)) == edit.target


def test_what_to_change_leads_to_the_caption() -> None:
    rng = random.Random(1)
    for _ in range(100):
        found = random_question(rng, 1, "train", "fix")
        target = done(found.scene, found.answer)
        places = listing(target)
        if places in found.text:
            continue
        assert all(f"{o.colour} {o.shape}" in found.text for o in target.objects)


def test_the_benchmark_is_the_same_for_everyone_and_has_all_kinds() -> None:
    first, again = visual_questions.benchmark(1, 21, 0), visual_questions.benchmark(1, 21, 0)
    assert first == again != visual_questions.benchmark(1, 21, 1)
    assert [q.kind for q in first] == [*KINDS] * 3
    assert isinstance(first[0], Question)
    assert NUMBERS[2] == "two" and parse(SCENE.canonical) == SCENE
