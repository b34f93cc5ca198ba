"""Prompts without targets: served at a size of their own, sampled from, judged by their facts, and never trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from micro import Brightness, built
from PIL import Image
from rl import SAMPLING, made
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.datamodule import Cache, ShardDataModule
from data_pipeline.errors import InputError
from data_pipeline.recipe import Recipe
from data_pipeline.sources import Manifest
from lightning_modules.distill import DistillModule, States, Teacher
from lightning_modules.kontext import KontextModule
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.protocol import Request
from lightning_modules.rollouts.settings import Regularisation


class Witness(Brightness):
    """Keeps what it was asked about."""

    def __init__(self) -> None:
        self.seen: dict[str, Request] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        self.seen |= {request.prompt: request for request in requests}
        self.sizes |= {request.prompt: tuple(pictures.shape[-2:]) for request in requests}
        return super().score(pictures, requests)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{i} cats", "tag": "counting", "include": [{"class": "cat", "count": i}]} for i in range(8)]
    for i in range(8):
        Image.fromarray(np.full((32, 64, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append({"prompt": f"make {i} red", "source": f"{i}.png", "number": i})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Recipe(Manifest(str(folder / "prompts.jsonl"), "prompts")).build(folder / "shards")
    return str(folder / "shards")


def data(shards: str, work: Path, **options) -> ShardDataModule:
    settings = {"batch_size": 4, "image_size": 32, "size_multiple": 16, "val_fraction": 0.0, "steps": 4} | options
    return ShardDataModule([shards], index_root=str(work / "index"), **{"prompt_records": True} | settings)


def fit(module: L.LightningModule, served: ShardDataModule, work: Path) -> None:
    L.Trainer(
        max_steps=4, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=work,
    ).fit(module, datamodule=served)  # fmt: skip


def test_prompts_say_how_large_a_picture_is_to_be_made(shards: str, tmp_path: Path) -> None:
    served = data(shards, tmp_path)
    served.setup("fit")
    batches: dict[str, ImageBatch] = {batch.task: batch for batch in served.train_dataloader()}
    drawn, edited = batches["text_to_image"], batches["edit"]
    assert not drawn.has_targets and drawn.references is None and drawn.target.shape == (4, 0, 32, 32)
    assert edited.target.shape == (4, 0, 16, 32) and edited.references.shape == (4, 1, 3, 16, 32)
    for facts, prompt in zip(drawn.metadata, drawn.prompts, strict=True):
        assert facts["tag"] == "counting"
        assert facts["include"] == [{"class": "cat", "count": int(prompt.split()[0])}]
    for facts, picture in zip(edited.metadata, edited.references, strict=True):
        assert torch.allclose(picture, torch.tensor(30 * facts["number"] / 127.5 - 1))
    assert set(served.prompts()) == {f"{i} cats" for i in range(8)} | {f"make {i} red" for i in range(8)}


@pytest.mark.parametrize("cached", [False, True])
def test_reinforcement_samples_from_prompts(shards: str, tmp_path: Path, cached: bool) -> None:
    witness = Witness()
    module: ReinforceModule = made(str(built()), reward=witness, steps=4)
    fit(module, data(shards, tmp_path, cache=Cache(str(tmp_path / "cache")) if cached else None), tmp_path)
    assert module.trainer.global_step == 4 and len(witness.seen) == 16
    for prompt, request in witness.seen.items():
        assert witness.sizes[prompt] == ((16, 32) if request.sources else (32, 32))
        assert [source.shape for source in request.sources] == ([(3, 16, 32)] if "red" in prompt else [])
        assert ("include" in request.metadata) == (not request.sources)


@pytest.mark.parametrize("cached", [False, True])
def test_distillation_needs_no_targets_on_states_of_its_own(shards: str, tmp_path: Path, cached: bool) -> None:
    teachers = {task: Teacher(str(built())) for task in ("edit", "text_to_image")}
    module = DistillModule(str(built()), teachers, States("student", num_inference_steps=2), steps=4)
    shapes, velocity = set(), module.target

    def target(student: object, x: Tensor, sigma: Tensor, batch: ImageBatch) -> Tensor:
        shapes.add((batch.task, tuple(x.shape[-2:])))
        return velocity(student, x, sigma, batch)

    module.target = target
    fit(module, data(shards, tmp_path, cache=Cache(str(tmp_path / "cache")) if cached else None), tmp_path)
    factor = module.pipeline().vae_scale_factor
    assert module.trainer.global_step == 4
    assert shapes == {("text_to_image", (32 // factor, 32 // factor)), ("edit", (16 // factor, 32 // factor))}
    with pytest.raises(InputError, match="use source: student"):
        fit(DistillModule(str(built()), teachers, steps=4), data(shards, tmp_path), tmp_path)


def test_prompts_are_left_out_of_supervised_training(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no record of .* prompts are for reinforcement, with data.prompt_records"):
        data(shards, tmp_path, prompt_records=False).setup("fit")
    with pytest.raises(InputError, match="prompts have no target to learn from"):
        fit(KontextModule(str(built()), steps=4), data(shards, tmp_path), tmp_path)
    supervised = made(str(built()), sampling=SAMPLING, regularisation=Regularisation(supervised=0.1))
    with pytest.raises(InputError, match="prompts have none; set it to 0"):
        fit(supervised, data(shards, tmp_path), tmp_path)
    with pytest.raises(InputError, match='use "alternate"'):
        data(shards, tmp_path, mixing="mixed")
