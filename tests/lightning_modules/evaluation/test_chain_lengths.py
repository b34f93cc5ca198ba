"""The sweep of AL-CoTD's constants: what is easy, what a row says, and when a setting meets the bar."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from chains import folder

from data_pipeline.length_control import hardness
from lightning_modules.evaluation.chain_lengths import Row, Said, compared, main, scores
from lightning_modules.evaluation.questions import QuestionBenchmark, held_out


def test_a_row_by_hand() -> None:
    before = [Said(10, True)] * 6
    after = [Said(5, True), Said(5, False), Said(9, True), Said(9, True), Said(10, True), Said(10, True)]
    row = compared("repetition", (0.1, 1.0, 1.0), [0.0, 0.1, 0.4, 0.5, 0.9, 1.0], before, after)
    assert row[4:] == pytest.approx((0.5, 1.0, -0.5, 0.0)) and not row.meets
    assert Row("end of thoughts", 1, 1, 1, 0.8, 1.05, -0.02, 0.0).meets
    assert not Row("end of thoughts", 1, 1, 1, 0.81, 1.0, 0.0, 0.0).meets
    assert not Row("end of thoughts", 1, 1, 1, 0.5, 0.9, 0.0, 0.0).meets


def test_questions_of_several_hops_are_harder_than_looking() -> None:
    items = held_out(QuestionBenchmark(200))
    hard = [hardness(values) for values in scores(items, "pictures")]
    assert 0 <= min(hard) < max(hard) <= 1
    kinds = {kind: [h for h, (_, q) in zip(hard, items, strict=True) if q.kind == kind] for kind in ("look", "hop")}
    assert max(kinds["look"]) < sum(kinds["hop"]) / len(kinds["hop"])


def test_the_sweep_writes_a_table(tmp_path: Path) -> None:
    settings = {"pretrained": folder(), "questions": 6, "alphas": [0.1], "weights": [[1.0, 2.0]], "end_biases": [4.0]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**settings, "max_new_tokens": 4, "output": str(tmp_path / "out" / "table.md")}))
    assert main(["-c", str(path)]) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith("| repetition | 0.1 | 1 | 2 |")
    assert lines[3].startswith("| end of thoughts | 4 |")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pretrained": "nowhere"}, "nowhere/config.json is missing"),
        ({"mode": "smell"}, "expected pictures or words"),
        ({"samples": 0}, "at least 1"),
        ({"weights": []}, "weights has a pair"),
        ({"end_biases": [-1.0]}, "at least 0"),
        ({"weights": [[1.0, -2.0]]}, "at least 0"),
    ],
)
def test_a_mistake_is_one_line(change: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"pretrained": folder(), "output": str(tmp_path / "table.md"), **change}))
    assert main(["-c", str(path)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and said in told and not (tmp_path / "table.md").exists()


def test_what_is_given_replaces_what_a_config_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"pretrained": folder(), "mode": "words"}))
    assert main(["-c", str(path), "--mode", "smell"]) == 2 and "smell" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["-c", str(tmp_path / "missing.yaml")])
