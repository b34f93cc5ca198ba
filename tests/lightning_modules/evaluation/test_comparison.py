"""Tables of arms: which outcome stands for a column, gains against hand computation, and the chart of them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from data_pipeline.errors import InputError
from lightning_modules.evaluation import gain_chart
from lightning_modules.evaluation.comparison import Trial, compare, markdown, record, stages

COLUMNS = {"edit": ["edit"], "edit, best": ["edit", "edit_2"]}
NONE = Trial({"edit": [0, 0, 1, 0], "edit_2": [1, 0, 1, 0]}, 0, 0.0)
FIRST = Trial({"edit": [1, 1, 1, 0], "edit_2": [1, 0, 0, 0]}, 100_000, 60.0)
SECOND = Trial({"edit": [1, 0, 1, 0], "edit_2": [1, 0, 0, 0]}, 120_000, 120.0)
TRIALS = {"none": [NONE], "rl": [FIRST, SECOND], "late": []}
WANTED = {"none": 1, "rl": 3, "late": 3}


def test_figures_by_hand() -> None:
    none, rl = compare(TRIALS, WANTED, COLUMNS, "none")
    assert (rl.trials, rl.wanted, rl.evaluations, rl.seconds) == (2, 3, 110_000, 90.0)
    edit = rl.figures["edit"]
    assert edit.value == pytest.approx((0.625, 0.625 - 12.7062 * 0.125, 0.625 + 12.7062 * 0.125), abs=1e-4)
    assert edit.gain.mean == 0.375 and edit.gains == [0.5, 0.25]  # items gain 1, 1/2, 0 and 0
    assert 0 <= edit.gain.low < 0.375 < edit.gain.high <= 1
    # Each takes its own best: the policy its first outcome (5/8), the baseline its second (1/2).
    best = rl.figures["edit, best"]
    assert (best.outcome, none.figures["edit, best"].outcome) == ("edit", "edit_2")
    assert best.gain.mean == 0.125 and none.figures["edit"].gain == (0, 0, 0)


def test_the_table_says_what_is_missing() -> None:
    text = markdown(compare(TRIALS, WANTED, COLUMNS, "none"), "none")
    lines = text.splitlines()
    assert lines[0] == "| arm | seeds | edit | edit, best | evaluations | minutes |"
    assert lines[2] == "| none | 1 | 0.250 | 0.500 | 0k | 0.0 |"
    assert lines[3].startswith("| rl | 2 of 3 | 0.625 ± 1.588 (+0.375, ") and lines[3].endswith("| 110k | 1.5 |")
    assert "late" not in text
    assert "nothing to compare" in markdown(compare({"rl": [FIRST]}, WANTED, COLUMNS, "none"), "none")


def test_what_a_paper_reports_stands_beside_what_was_measured() -> None:
    lines = markdown(compare(TRIALS, WANTED, COLUMNS, "none"), "none", {"rl": {"MMMU": 69.0}}).splitlines()
    titles = [title.strip() for title in lines[0].split("|")[1:-1]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert [dict(zip(titles, row, strict=True))["paper: MMMU"] for row in rows] == ["", "69"]
    assert lines[1].count("---") == len(titles)


def test_a_stage_is_measured_against_the_one_before_it() -> None:
    [stage] = stages({**TRIALS, "more": [SECOND]}, COLUMNS, {"more": "rl", "late": "more", "rl": "late"})
    assert (stage.arm, stage.before) == ("more", "rl") and stage.gains["edit"].mean == -0.125  # 1/2 after 5/8
    text = markdown(compare(TRIALS, WANTED, COLUMNS, "none"), "none", None, [stage])
    assert "| arm | after | edit | edit, best |" in text and "| more | rl | -0.125 (" in text


def test_records_are_valid_json() -> None:
    rows = compare(TRIALS, WANTED, COLUMNS, "none")
    plain = json.loads(json.dumps([*map(record, rows)], allow_nan=False))
    assert plain[0]["figures"]["edit"]["interval"] is None and plain[1]["figures"]["edit"]["mean"] == 0.625


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(InputError, match="none has no outcome t2i; there is edit, edit_2"):
        compare({"none": [NONE], "rl": [FIRST]}, WANTED, {"t2i": ["t2i"]}, "none")
    other = Trial({"edit": [0, 1]}, 0, 0.0)
    with pytest.raises(InputError, match="other items than the baseline"):
        compare({"none": [NONE], "rl": [other]}, WANTED, {"edit": ["edit"]}, "none")


def test_the_chart_places_gains_on_one_scale() -> None:
    rows = compare(TRIALS, WANTED, COLUMNS, "none")
    root = ElementTree.fromstring(gain_chart.draw(rows, "none"))
    space = {"s": "http://www.w3.org/2000/svg"}
    circles = root.findall("s:circle", space)
    assert len(circles) == 2 * (2 + 1)  # for each column two seeds and their mean
    first = [float(c.get("cx")) for c in circles[:3]]
    assert first[2] == pytest.approx((first[0] + first[1]) / 2, abs=0.1)
    places = [(t.text, float(t.get("x"))) for t in root.findall("s:text", space)]
    second = [text for text, _ in places].index("edit, best")
    ticks = dict(places[:second])
    unit = (ticks["+0.4"] - ticks["0"]) / 0.4
    assert first == pytest.approx([ticks["0"] + unit * gain for gain in (0.5, 0.25, 0.375)], abs=0.2)
    assert ElementTree.fromstring(gain_chart.draw([], "none")) is not None


def test_a_papers_figures_stand_in_columns_of_their_own() -> None:
    text = markdown(compare(TRIALS, WANTED, COLUMNS, "none"), "none", {"rl": {"GenEval": 0.86}})
    lines = text.splitlines()
    assert lines[0] == "| arm | seeds | edit | edit, best | paper: GenEval | evaluations | minutes |"
    assert lines[2].endswith("| 0.500 |  | 0k | 0.0 |") and "| 0.86 | 110k |" in lines[3]
