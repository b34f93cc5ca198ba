from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from micro_r1v import question_shards

from data_pipeline.errors import InputError
from data_pipeline.index import load_index, read_member
from data_pipeline.scenes.questions import (
    BEST,
    CHECKED,
    FLAWS,
    KINDS,
    Question,
    boxed,
    checked,
    draw,
    flawed,
    in_words,
    written,
)
from data_pipeline.scenes.world import COLOURS, LEVELS, Object, Scene, parse
from data_pipeline.sources import SceneQuestions


def seen(text: str, scene: Scene) -> list[Object]:
    """The objects of a scene that a phrase names, by its words alone."""
    words = set(text.replace("the ", "").split())
    return [
        o
        for o in scene.objects
        if words <= {o.size, o.colour, o.shape, "shape", *LEVELS[scene.level].cell_names[o.cell].split()}
    ]


def truth(scene: Scene, text: str) -> str:
    """The answer to a question, found from its words by other means than those that made it."""
    grid, names = LEVELS[scene.level].grid, LEVELS[scene.level].cell_names
    move = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    text = text.removesuffix("?")

    def singular(words: str) -> str:
        last = words.split()[-1]
        return words.removesuffix(last) + (last.removesuffix("es") if last == "crosses" else last.removesuffix("s"))

    def named(words: str) -> list[Object]:
        if words.startswith("what is "):
            words = words.removeprefix("what is ")
        relation = next((r for r in move if words.startswith(f"{r} ")), None)
        if relation is None:
            return seen(words, scene)
        down, across = move[relation]
        row, column = divmod(named(words.removeprefix(f"{relation} "))[0].cell, grid)
        found = scene.at((row + down) * grid + column + across)
        return [] if found is None else [found]

    if text.startswith("how many "):
        return str(len(seen(singular(text.removeprefix("how many ").removesuffix(" are there")), scene)))
    if text.startswith("are there more "):
        first, second = text.removeprefix("are there more ").split(" than ")
        more = len(seen(singular(first), scene)) > len(seen(singular(second), scene))
        return "yes" if more else "no"
    if text.startswith("is the "):
        relation = next(r for r in move if f" {r} the " in text)
        first, second = (seen(part, scene)[0].cell for part in text.removeprefix("is ").split(f" {relation} "))
        (row1, column1), (row2, column2) = divmod(first, grid), divmod(second, grid)
        down, across = move[relation]
        return "yes" if down * (row1 - row2) + across * (column1 - column2) > 0 else "no"
    if text.startswith("where is "):
        return names[seen(text.removeprefix("where is "), scene)[0].cell]
    for opening, attribute in (("what colour is ", "colour"), ("which shape is ", "shape")):
        if text.startswith(opening):
            (o,) = named(text.removeprefix(opening))
            return getattr(o, attribute)
    (o,) = seen(text.removeprefix("what is "), scene)
    return f"{o.size if scene.level > 1 else ''} {o.colour} {o.shape}".strip()


@pytest.mark.parametrize("level", [1, 2])
def test_every_answer_is_right(level: int) -> None:
    rng = random.Random(level)
    for _ in range(600):
        scene, question = draw(rng, level, "train")
        assert scene.split == "train"
        assert question.answer == truth(scene, question.text), (in_words(scene), question)
        assert question.chain


def test_kinds_are_balanced_and_so_are_yes_and_no() -> None:
    rng = random.Random(0)
    drawn = [draw(rng, 1, "val")[1] for _ in range(1500)]
    kinds = Counter(q.kind for q in drawn)
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 150
    said = Counter(q.answer for q in drawn if q.kind in ("compare", "relate"))
    assert 0.4 < said["yes"] / said.total() < 0.6
    assert max(q.hops for q in drawn) == 3


def test_styles() -> None:
    question = Question("how many?", "2", "count", ("one.", "two."))
    scene = parse("1|white|0:blue-square-large|3:red-circle-large")
    assert written(question, "short", scene) == "2"
    assert written(question, "chain", scene) == f"<think>\none. two.\n</think>\n{boxed('2')}"
    assert written(question, "steps", scene) == "one. two. so 2"
    assert written(question, "describe", scene) == "blue square top left, red circle bottom right."


def test_flaws_are_what_their_scores_say() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene, question = draw(rng, 1, "train")
        bad = {score: flawed(rng, question, score, scene) for score in FLAWS}
        assert all(q.text == question.text for q in bad.values())
        assert bad[4].chain == question.chain * 2 and bad[4].answer == question.answer
        assert bad[3].chain == () and bad[2].answer == question.answer
        assert bad[2].chain[1:] == question.chain
        assert bad[1].answer != question.answer


def test_most_chains_look_again_and_none_of_them_says_anything_new() -> None:
    rng = random.Random(0)
    question = Question("how many?", "2", "count", ("one.", "two."))
    drawn = Counter(checked(rng, question).chain for _ in range(2000))
    assert set(drawn) == {question.chain, (*question.chain, "check: two.")}
    assert abs(drawn[question.chain] / 2000 - (1 - CHECKED)) < 0.03
    bare = replace(question, chain=())
    assert all(checked(rng, bare) == bare for _ in range(20))
    told = [
        SceneQuestions(counts={s: 99}).record(s, n, "train").turns[1][1] for s in ("chain", "steps") for n in range(99)
    ]
    assert 60 < sum(" check: " in text for text in told[:99]) < 90 and not any("check" in text for text in told[99:])


def test_records_are_functions_of_their_numbers(tmp_path: Path) -> None:
    folder = question_shards(tmp_path / "shards", counts={"short": 16, "chain": 32}, flawed=0.5)
    found = {r.key: json.loads(read_member(r, "json")) for r in load_index(folder)}
    assert len(found) == 48
    scores = Counter(facts["metadata"]["score"] for facts in found.values() if facts["split"] == "train")
    assert scores[BEST] > 10 and len(scores) > 3
    held = [facts for facts in found.values() if facts["split"] == "val"]
    assert len(held) == 3 and all(facts["metadata"]["score"] == BEST for facts in held)
    assert all(parse(facts["metadata"]["scene"]).split == facts["split"] for facts in found.values())
    source = SceneQuestions(counts={"short": 16, "chain": 32}, flawed=0.5)
    record = source.record("chain", 3, "train")
    assert [list(turn) for turn in record.turns] == found["chain-0000003"]["turns"]
    told = SceneQuestions(counts={"short": 4}, words=True).record("short", 1, "train")
    assert told.pictures == () and any(colour in told.turns[0][1] for colour in COLOURS)


@pytest.mark.parametrize(
    "settings", [{"level": 3}, {"counts": {"long": 3}}, {"counts": {"short": 0}}, {"flawed": 2}, {"kinds": ["why"]}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match=r"source\."):
        SceneQuestions(**settings)
