"""predict with a Metaquery model: pictures, edits and answers from one file; and who cannot answer says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from micro import built, micro_metaquery
from PIL import Image

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


def test_understanding_is_measured_by_kind(folder: Path) -> None:
    settings = SceneBenchmark(count=14, tasks=("understanding",), batch_size=7)
    found = evaluate(MetaqueryPipeline.from_pretrained(folder), settings)
    kinds = {"describe", "cell", "count", "presence", "after", "fix", "plan"}
    assert set(found) == {"understanding", *(f"understanding_{kind}" for kind in kinds)}
    with pytest.raises(InputError, match="names understanding, and this model cannot be asked"):
        evaluate(KontextPipeline.from_pretrained(built()), settings)
