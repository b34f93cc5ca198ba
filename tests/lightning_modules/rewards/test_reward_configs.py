"""Every served reward's config: headed by its command, read by the server's own parser, clear about what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.errors import InputError
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.pipelines.scorers import ClipEmbedder
from lightning_modules.rewards import remote
from lightning_modules.rewards.detector import GenEval, TransformersDetector
from lightning_modules.rewards.learned import LearnedEditReward
from lightning_modules.rewards.models import Judged
from lightning_modules.rewards.ocr import TextRendering, TransformersReader
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.remote import main, read_reward

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs" / "rewards").glob("*.yaml"))
CLASSES = {"geneval": GenEval, "judge": Judged, "learned": LearnedEditReward, "text": TextRendering}
SERVED = "python -m lightning_modules.rewards.remote -c "


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_headed_by_its_command_and_makes_the_class_that_it_names(path: Path) -> None:
    assert path.read_text().startswith(f"# {SERVED}{path.relative_to(ROOT)} --port 85")
    found = read_reward(path)
    assert type(found) is CLASSES[path.stem]
    named = yaml.safe_load(path.read_text())["class_path"]
    assert f"{type(found).__module__}.{type(found).__name__}" == named


def test_the_parts_are_those_that_the_configs_name() -> None:
    found = {path.stem: read_reward(path) for path in CONFIGS}
    geneval, text, learned = found["geneval"], found["text"], found["learned"]
    assert isinstance(geneval, GenEval) and isinstance(geneval.embedder, ClipEmbedder)
    assert isinstance(geneval.detector, TransformersDetector) and geneval.kind == "soft"
    assert isinstance(text, TextRendering) and isinstance(text.reader, TransformersReader)
    assert isinstance(learned, LearnedEditReward) and learned.folder == "runs/sd35m/edit_reward/latest/export"


@pytest.mark.parametrize(("name", "folder"), [("geneval", "mask2former"), ("learned", "edit_reward"), ("text", "GOT")])
def test_weights_that_are_not_there_are_named(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = read_reward(ROOT / "configs" / "rewards" / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    facts = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    request = Request('make it "red"', (torch.zeros(3, 8, 8),), facts)
    with pytest.raises(CheckpointError, match=folder):
        reward.score(torch.zeros(1, 3, 8, 8), [request])


def test_full_size_configs_name_rewards_that_are_there() -> None:
    heads = {path.stem: path.read_text() for path in (ROOT / "configs" / "sd35m").glob("pdtr_*.yaml")}
    named = [
        line.partition(SERVED)[2].split()[0] for text in heads.values() for line in text.split("\n") if SERVED in line
    ]
    assert len(set(named)) == 2 and all((ROOT / config).is_file() for config in named)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty; expected class_path"),
        ("class_path: [", "names no reward"),
        ("class_path: lightning_modules.rewards.models.Nothing", "names no reward"),
        ("class_path: lightning_modules.rewards.detector.TransformersDetector", "names no reward"),
        ("class_path: lightning_modules.rewards.learned.LearnedEditReward\ninit_args: {size: 3}", "names no reward"),
    ],
)
def test_what_names_no_reward_is_refused_in_one_line(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.TOKEN, "open sesame")
    path = tmp_path / "reward.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=expected):
        read_reward(path)
    assert main(["-c", str(path), "--port", "0"]) == 2
    assert f"error: {path}" in capsys.readouterr().err
