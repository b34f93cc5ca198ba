"""predict with a Metaquery model: pictures, edits and answers from one file; and who cannot answer says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro import built, micro_metaquery
from PIL import Image

from data_pipeline.counters import counter_seed
from data_pipeline.errors import InputError
from lightning_modules import commands
from lightning_modules.evaluation.scenes import SceneBenchmark, evaluate
from lightning_modules.pipelines import KontextPipeline, MetaqueryPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_metaquery(tmp_path_factory.mktemp("metaquery") / "folder")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {}, "data": {"init_args": {"image_size": 32}}}))
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "in" / f"{name}.png")
    return path


def test_one_file_has_all_three_verbs(folder: Path, config: Path) -> None:
    rows = [
        {"prompt": "a red circle"},
        {"prompt": "it", "image": "in/a.png"},
        {"question": "What?", "image": "in/a.png"},
    ]
    lines = config.with_name("requests.jsonl")
    lines.write_text("\n".join(json.dumps(row) for row in [*rows, {"question": "Where is what?"}]))
    out = config.with_name("out")
    options = ["predict", "-c", config, "--export", folder, "--input", lines, "--output", out, "--steps", "1"]
    assert commands.run([*map(str, options)]) == 0
    assert len([*out.glob("*.png")]) == 2
    answers = [json.loads(line) for line in (out / commands.ANSWERS).read_text().splitlines()]
    pipeline, picture = MetaqueryPipeline.from_pretrained(folder), Image.open(config.parent / "in" / "a.png")
    assert [row["question"] for row in answers] == ["What?", "Where is what?"]
    assert [row["answer"] for row in answers] == pipeline.ask(["What?", "Where is what?"], [picture, None])


def test_a_question_about_every_picture_of_a_folder(folder: Path, config: Path) -> None:
    out = config.with_name("out")
    options = ["predict", "-c", config, "--export", folder, "--input", config.parent / "in", "--output", out]
    assert commands.run([*map(str, options), "--question", "What is it?"]) == 0
    assert [json.loads(line)["name"] for line in (out / commands.ANSWERS).read_text().splitlines()] == ["a", "b"]
    with pytest.raises(InputError, match="--instruction TEXT, or --question TEXT"):
        commands.run([*map(str, options), "--question", "What?", "--instruction", "make it red"])
    plain = [*map(str, options), "--question", "What?"]
    plain[plain.index(str(folder))] = str(built())
    with pytest.raises(InputError, match="this model cannot answer"):
        commands.run(plain)


def test_answers_are_as_long_and_as_warm_as_asked_for(folder: Path, config: Path) -> None:
    out, picture = config.with_name("out"), Image.open(config.parent / "in" / "b.png")
    options = ["predict", "-c", config, "--export", folder, "--input", config.parent / "in", "--output", out]

    def answers(*more: str) -> list[str]:
        assert commands.run([*map(str, options), "--question", "What is it?", *more]) == 0
        return [json.loads(line)["answer"] for line in (out / commands.ANSWERS).read_text().splitlines()]

    pipeline = MetaqueryPipeline.from_pretrained(folder)
    assert answers() == pipeline.ask(["What is it?"] * 2, picture)
    assert answers("--max_new_tokens", "3")[1:] == pipeline.ask("What is it?", picture, max_new_tokens=3)
    warm = ("--max_new_tokens", "12", "--temperature", "2.5")
    first = answers(*warm)
    assert first == answers(*warm, "--seed", "0") != answers(*warm, "--seed", "1")
    assert first[0] != first[1]  # the same picture and question: each request has its own draws
    drawn, state = counter_seed(0, "answer", 0, 1), torch.get_rng_state()
    assert first[1:] == pipeline.ask("What is it?", picture, max_new_tokens=12, temperature=2.5, seed=drawn)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--max_new_tokens", "0", "is 0; expected a whole number of at least 1"),
        ("--max_new_tokens", "2.5", "is 2.5; expected a whole number"),
        ("--temperature", "-1", "is -1; expected a finite number of at least 0"),
        ("--temperature", "nan", "is nan; expected a finite number"),
        ("--temperature", "inf", "is inf; expected a finite number"),
        ("--temperature", "warm", "invalid temperature value: 'warm'"),
    ],
)
def test_no_answer_is_that_long_or_that_warm(
    option: str, value: str, expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        commands.run(["predict", "-c", str(config), "--input", "in", "--output", "out", f"{option}={value}"])
    assert f"{option}: {expected}" in " ".join(capsys.readouterr().err.split())


def test_settings_of_answers_are_refused_where_nothing_is_asked(folder: Path, config: Path) -> None:
    options = ["predict", "-c", config, "--export", folder, "--input", config.parent / "in", "--output", "out"]
    with pytest.raises(InputError, match=r"--temperature is for answers, and .* asks no question"):
        commands.run([*map(str, options), "--instruction", "make it red", "--temperature", "1"])


def test_understanding_is_measured_by_kind(folder: Path) -> None:
    settings = SceneBenchmark(count=14, tasks=("understanding",), batch_size=7)
    found = evaluate(MetaqueryPipeline.from_pretrained(folder), settings)
    kinds = {"describe", "cell", "count", "presence", "after", "fix", "plan"}
    assert set(found) == {"understanding", *(f"understanding_{kind}" for kind in kinds)}
    with pytest.raises(InputError, match="names understanding, and this model cannot be asked"):
        evaluate(KontextPipeline.from_pretrained(built()), settings)
