"""Golden losses of each stage: a hundred steps on a micro folder (tests/golden.py says how they are compared)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import golden as files
import lightning as L
import pytest
import torch
from golden import BEGINNING, TOLERANCE, check
from micro import built
from micro_r1v import part, question_shards
from rl import made, prompts, trained

from data_pipeline.chat_datamodule import ChatDataModule
from lightning_modules.kontext import KontextModule
from lightning_modules.reasoning import R1VModule
from lightning_modules.rollouts.algorithms import DiffusionNFT
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.schedule import AdamW

Golden = Callable[[str, Sequence[float]], None]
STEPS = 100
OPTIMIZER = AdamW(lr=1e-3, warmup_steps=10)
SAMPLING = Sampling(group_size=3, groups=1, micro_groups=1, num_inference_steps=2)
REGULARISATION = Regularisation(old_rate=0.25)


def losses(module: L.LightningModule, task: str, count: int, root: Path) -> list[float]:
    """The loss of each step."""
    found: list[float] = []
    module.log = lambda name, value, **_: found.append(float(value)) if name == "train/loss" else None
    texts = [str(i) for i in range(count)]  # of single characters, which every tokenizer splits alike
    trained(module, [replace(prompts(i, task, count), prompts=texts) for i in range(STEPS)], STEPS, root)
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("task", ["text_to_image", "edit"])
def test_kontext(golden: Golden, task: str, tmp_path: Path) -> None:
    module = KontextModule(str(built()), steps=STEPS, optimizer=OPTIMIZER)
    golden(f"kontext_{task}", losses(module, task, 4, tmp_path))


@pytest.mark.parametrize("task", ["text_to_image", "edit"])
def test_reinforcement(golden: Golden, task: str, tmp_path: Path) -> None:
    settings = {"sampling": SAMPLING, "optimizer": OPTIMIZER, "steps": STEPS}
    module = made(
        str(built()), DiffusionNFT(points_per_picture=2), regularisation=Regularisation(old_rate=0.25), **settings
    )
    golden(f"reinforce_{task}", losses(module, task, 1, tmp_path))


def test_sight_by_a_projector(golden: Golden, tmp_path: Path) -> None:
    module = R1VModule(str(part("tower")), str(part("reasoner")), context=128, max_tiles=1, optimizer=OPTIMIZER)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # parts are trained for a step, whose rounding is the CPU's own
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 if p.ndim > 1 else torch.ones_like(p))
    shards = question_shards(tmp_path / "shards", flawed=0.5)
    data = ChatDataModule([str(shards)], batch_size=2, steps=STEPS)
    found: list[float] = []
    module.log = lambda name, value, **_: found.append(float(value)) if name == "train/loss" else None
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, default_root_dir=tmp_path,
        limit_val_batches=0, **options,
    )  # fmt: skip
    run.fit(module, datamodule=data)
    golden("r1v_sft", found)


def test_values_are_compared_exactly_where_release_and_cpu_match(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    values = [1 + i / 7 for i in range(2 * BEGINNING)]
    close = [v * (1 + TOLERANCE / 10) for v in values]
    check("x", values, rewrite=True)
    check("x", values)
    with pytest.raises(AssertionError):
        check("x", close)
    stored = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**stored, "torch": "another"}))
    check("x", [*close[:BEGINNING], *([0.0] * BEGINNING)])
    with pytest.raises(AssertionError):
        check("x", [values[0] * (1 + 10 * TOLERANCE), *values[1:]])
