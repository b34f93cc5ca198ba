"""GenEval's verdicts, by hand and as the official code gave them.

geneval_verdicts.json holds generated detections, in the order of a detector, with what evaluation/evaluate_images.py of
djghosh13/geneval (16f1681) and reward_server/gen_eval.py of yifan123/reward-server (7131478) made of them at their own
settings, the colour of each crop being given. Sets lie on both sides of the thresholds and of the borders of positions;
equals are ordered as by the official environment's NumPy 1.23.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_modules.rewards.geneval import COLOURS, Detection, correct, flow_grpo, outcomes, relations, soft, strict

RECORDED = json.loads(Path(__file__).with_name("geneval_verdicts.json").read_text())
TAGS = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def box(x: float, y: float, size: float = 10, confidence: float = 0.95, colour: str = "") -> Detection:
    return Detection((x, y, x + size, y + size), confidence, colour)


TWO = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
COUNT = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 3}],
    "exclude": [{"class": "cat", "count": 4}],
}
COLOUR = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}
PLACE = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}


def recorded() -> list[tuple[dict, dict[str, list[Detection]], bool, bool, float, str]]:
    """Metadata, objects by class, the benchmark's verdict, the server's strict one and its score, and what was wrong:
    n counts, c colours, p a position, t what it refers to, x something excluded."""
    found = []
    for number, rows, *verdicts in RECORDED["cases"]:
        objects: dict[str, list[Detection]] = {}
        for name, *box, confidence, colour in rows:
            objects.setdefault(RECORDED["classes"][name], []).append(Detection(tuple(box), confidence, COLOURS[colour]))
        right, exact, score, wrong = verdicts
        found.append((RECORDED["metadata"][number], objects, bool(right), bool(exact), score, wrong))
    return found


def test_the_record_covers_each_task_and_each_reason() -> None:
    found = recorded()
    verdicts = Counter((facts["tag"], right) for facts, _, right, *_ in found)
    assert len(found) >= 400 and min(verdicts[tag, right] for tag in TAGS for right in (True, False)) >= 8
    reasons = Counter(reason for *_, wrong in found for reason in wrong)
    assert min(reasons[reason] for reason in "ncptx") >= 8
    assert {0.3, 0.9} <= {d.confidence for _, objects, *_ in found for each in objects.values() for d in each}
    assert sum(len(each) > 16 for _, objects, *_ in found for each in objects.values()) >= 4


def test_verdicts_are_the_official_ones() -> None:
    for facts, objects, right, *_ in recorded():
        assert correct(facts, objects) == right, (facts, objects)


def test_strict_verdicts_are_the_servers_but_for_what_is_excluded() -> None:
    for facts, objects, right, exact, *_ in recorded():
        assert strict(facts, objects) == (exact and right), (facts, objects)


def test_scores_are_the_servers_and_soft_ones_differ_where_they_say() -> None:
    alike = 0
    for facts, objects, _, _, score, _ in recorded():
        assert flow_grpo(facts, objects) == pytest.approx(score, abs=1e-6), (facts, objects)
        outcome = outcomes(facts, objects)
        both = any({"color", "position"} <= clause.keys() for clause in facts["include"])
        if not both and all(o.number >= 0 and o.position != "wrong" for o in outcome):
            assert soft(facts, objects) == pytest.approx(score, abs=1e-6), (facts, objects)
            alike += 1
        assert 0 <= soft(facts, objects) <= 1
        assert (soft(facts, objects) == 1) == (flow_grpo(facts, objects) == 1)
    assert alike >= 300


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (box(0, 0), box(50, 0), {"left of"}),
        (box(50, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 50), {"above"}),
        (box(0, 50), box(0, 0), {"below"}),
        (box(0, 0), box(50, 50), {"left of", "above"}),  # 48 of 70.7 on both axes
        (box(0, 0), box(1, 1), set()),  # within the margin of 0.1 x 20
        (box(0, 0), box(50, 20), {"left of"}),  # 18 of 53.9 is less than half
        (box(0, 0, 100), box(15, 0, 100), set()),
    ],
)
def test_relations_by_hand(a: Detection, b: Detection, wanted: set[str]) -> None:
    assert relations(a, b) == wanted


def test_verdicts_by_hand() -> None:
    assert correct(TWO, {"cat": [box(0, 0)], "dog": [box(50, 0)]}) and not correct(TWO, {"cat": [box(0, 0)]})
    assert not correct(TWO, {"cat": [box(0, 0)], "dog": [box(50, 0, confidence=0.3)]})  # above 0.3, not at it
    for count, verdict in ((2, False), (3, True), (4, False)):
        assert correct(COUNT, {"cat": [box(i, 0) for i in range(count)]}) is verdict
    assert not correct(COUNT, {"cat": [box(i, 0, confidence=0.8) for i in range(3)]})
    assert correct(COLOUR, {"cat": [box(0, 0, colour="red")], "dog": [box(0, 0, colour="blue")]})
    assert not correct(COLOUR, {"cat": [box(0, 0, colour="blue")], "dog": [box(0, 0, colour="blue")]})
    assert correct(PLACE, {"dog": [box(50, 0)], "cat": [box(0, 0)]})
    assert not correct(PLACE, {"dog": [box(0, 0)], "cat": [box(50, 0)]}) and not correct(PLACE, {"cat": [box(0, 0)]})


def test_the_most_confident_decide_and_more_than_asked_for_is_correct_but_not_strict() -> None:
    several = {"cat": [box(0, 0, confidence=0.5, colour="blue"), box(0, 0, colour="red")], "dog": []}
    red = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert correct(red, several) and not strict(red, several)
    assert strict(red, {"cat": [box(0, 0, colour="red")]})


def test_soft_rewards_by_hand() -> None:
    assert soft(COUNT, {"cat": [box(i, 0) for i in range(2)]}) == pytest.approx(2 / 3)
    assert soft(COUNT, {"cat": [box(i, 0) for i in range(6)]}) == 0
    assert soft(COLOUR, {"cat": [box(0, 0, colour="red")], "dog": [box(0, 0, colour="red")]}) == pytest.approx(3 / 4)
    assert soft(COLOUR, {"cat": [box(0, 0, colour="red")] * 2, "dog": [box(0, 0, colour="blue")]}) == pytest.approx(0.5)
    assert soft(PLACE, {"dog": [box(50, 0)], "cat": [box(0, 0)]}) == 1
    assert soft(PLACE, {"dog": [box(0, 0)], "cat": [box(50, 0)]}) == pytest.approx(2 / 3)
    assert soft(PLACE, {}) == 0


def test_what_a_position_refers_to_must_itself_be_as_wanted() -> None:
    two_dogs = {"dog": [box(50, 0), box(80, 0)], "cat": [box(0, 0)]}
    assert soft(PLACE, two_dogs) == pytest.approx((0 + 1 + 0) / 3)
    coloured = {**PLACE, "include": [{"class": "dog", "count": 1, "color": "red"}, PLACE["include"][1]]}
    blue_dog = {"dog": [box(50, 0, colour="blue")], "cat": [box(0, 0)]}
    assert soft(coloured, blue_dog) == pytest.approx((1 + 0 + 1 + 0) / 4)
