import pytest

from lightning_modules.rewards.geneval import Detection, correct, relations, soft, strict


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
