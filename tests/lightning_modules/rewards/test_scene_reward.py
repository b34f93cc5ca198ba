import random

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.scenes import edit_record, random_caption, text_image_record
from data_pipeline.scenes.captions import Caption, Clause, meaning
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import Object, Scene, parse
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.scenes import SceneReward

RED, BLUE = Object(0, "red", "circle"), Object(3, "blue", "square")


def picture(scene: Scene) -> torch.Tensor:
    return torch.from_numpy(np.array(render(scene))).permute(2, 0, 1).float() / 255


def scores(kind: str, scenes: list[Scene], request: Request) -> list[float]:
    return SceneReward(kind).score(torch.stack([picture(s) for s in scenes]), [request] * len(scenes))


def request_of(caption: Caption, scene: Scene) -> Request:
    return Request(caption.text, (), {"scene": scene.canonical, "task": caption.task, "meaning": meaning(caption)})


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("kind", ["strict", "soft"])
def test_what_was_asked_for_is_worth_one_and_an_empty_picture_little(level: int, kind: str) -> None:
    for number in range(12):
        record = text_image_record(level, 3, number, "train")
        wanted, request = parse(record.metadata["scene"]), Request(record.prompt, (), dict(record.metadata))
        found = scores(kind, [wanted, Scene(level, (), wanted.background)], request)
        assert found[0] == 1 and found[1] <= 0.5
        edit = edit_record(level, 3, number, "train")
        wanted, source = parse(edit.metadata["scene"]), parse(edit.metadata["source"])
        found = scores(kind, [wanted, source], Request(edit.prompt, (), dict(edit.metadata)))
        assert found[0] == 1 and found[1] == (1 if wanted == source else 0)


def test_any_scene_that_satisfies_a_caption_is_worth_one() -> None:
    rng = random.Random(0)
    scene, caption = random_caption(rng, 1, "train")
    while caption.task != "color_attr":
        scene, caption = random_caption(rng, 1, "train")
    moved = [Object(3 - o.cell, o.colour, o.shape, o.size) for o in scene.objects]
    assert scores("soft", [Scene(1, tuple(moved))], request_of(caption, scene)) == [1.0]


def test_soft_scores_by_hand() -> None:
    two = Caption("", "color_attr", (Clause(1, "circle", "red"), Clause(1, "square", "blue")))
    request = request_of(two, Scene(1, (RED, BLUE)))
    three = Object(1, "green", "cross")
    found = scores("soft", [Scene(1, (RED,)), Scene(1, (RED, BLUE, three)), Scene(1, (RED, three))], request)
    # one of two clauses; both, but one object of two too many; one clause of two
    assert found == pytest.approx([0.5, 0.5, 0.5])
    count = Caption("", "counting", (Clause(3, "circle"),))
    circles = tuple(Object(i, "red", "circle") for i in range(3))
    assert scores("soft", [Scene(1, circles[:2])], request_of(count, Scene(1, circles))) == pytest.approx([2 / 3])


def test_an_edit_that_spoils_the_rest_is_worth_less_than_one_that_does_not() -> None:
    source, target = Scene(1, (RED, BLUE)), Scene(1, (RED,))
    request = Request("remove the blue square", (), {
        "scene": target.canonical, "source": source.canonical, "task": "remove",
    })  # fmt: skip
    spoiled = Scene(1, (Object(0, "green", "circle"),))
    assert scores("soft", [target, source, spoiled], request) == pytest.approx([1, 0, 2 / 3])
    assert scores("strict", [target, source, spoiled], request) == [1, 0, 0]


def test_records_of_other_data_are_named() -> None:
    with pytest.raises(InputError, match="expected records of scenes"):
        SceneReward().score(torch.zeros(1, 3, 64, 64), [Request("a cat")])
