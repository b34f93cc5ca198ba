"""predict with an R1V model: answers to questions about pictures, from a folder of them or a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro_r1v import micro_r1v
from PIL import Image

from data_pipeline.chains import split
from data_pipeline.counters import counter_seed
from lightning_modules import commands
from lightning_modules.networks.layout import Layout
from lightning_modules.pipelines.answering import Decoding, TransformersEngine

TOKENS = 6


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    micro_r1v().save_pretrained(tmp_path / "export")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": {}, "data": {}, "benchmark": {"max_new_tokens": TOKENS}}))
    (tmp_path / "in").mkdir()
    for name, grey in {"a": 0, "b": 200}.items():
        Image.fromarray(np.full((70, 90, 3), grey, np.uint8)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "c.png").write_bytes(b"no picture")
    options = ["predict", "-c", config, "--export", tmp_path / "export", "--output", tmp_path / "out", "--input"]
    return [*map(str, options)]


def answers(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "out" / commands.ANSWERS).read_text().splitlines()]


def test_every_picture_of_a_folder_is_asked_about(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run([*options, str(tmp_path / "in"), "--question", "what is top left?"]) == 0
    found = answers(tmp_path)
    assert [row["name"] for row in found] == ["a", "b"]
    model = micro_r1v()
    shown = torch.full((3, 70, 90), 200, dtype=torch.uint8)
    sample = Layout.of(model).prompt([("user", "<image>\nwhat is top left?")], [shown])
    [said] = TransformersEngine().answers(model, [sample], 1, Decoding(TOKENS, 0.0), 0)
    text = split(model.tokenizer.decode([t for t in said.tolist() if t != model.tokenizer.eos_token_id]))
    assert (found[1]["answer"], found[1]["thought"]) == (text.said.strip(), text.thought.strip())
    printed = capsys.readouterr()
    assert "2 answers" in printed.out and "1 skipped" in printed.out and "c.png is not a readable" in printed.err


def test_answers_are_drawn_with_the_seed_and_as_long_as_asked_for(options: list[str], tmp_path: Path) -> None:
    lines = tmp_path / "asked.jsonl"
    lines.write_text("\n".join([json.dumps({"question": "two and two?"})] * 2))

    def said(*more: str) -> list[str]:
        assert commands.run([*options, str(lines), *more]) == 0
        return [row["thought"] + row["answer"] for row in answers(tmp_path)]

    assert len(set(said())) == 1  # the likeliest answer, whatever the seed
    assert said("--seed", "1") == said("--temperature", "0")
    warm = said("--temperature", "3", "--max_new_tokens", "12")
    assert warm == said("--temperature", "3", "--max_new_tokens", "12", "--seed", "0") and warm[0] != warm[1]
    assert warm != said("--temperature", "3", "--max_new_tokens", "12", "--seed", "1")
    model = micro_r1v()
    sample = Layout.of(model).prompt([("user", "two and two?")], [])
    [drawn] = TransformersEngine().answers(model, [sample], 1, Decoding(12, 3.0), counter_seed(0, "answer", 0, 1))
    chain = split(model.tokenizer.decode([t for t in drawn.tolist() if t != model.tokenizer.eos_token_id]))
    assert warm[1] == chain.thought.strip() + chain.said.strip()


def test_a_file_may_ask_without_a_picture_and_what_cannot_be_asked_is_skipped(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "how many?", "image": "in/a.png"}, {"question": "two and two?"}, {"question": "<|User|>?"}]
    lines = tmp_path / "asked.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert commands.run([*options, str(lines)]) == 0
    assert [row["question"] for row in answers(tmp_path)] == ["how many?", "two and two?"]
    assert "reserved token" in capsys.readouterr().err
    lines.write_text(json.dumps(rows[-1]))
    assert commands.run([*options, str(lines)]) == 2 and answers(tmp_path) == []
