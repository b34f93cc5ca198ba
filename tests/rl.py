"""Micro reinforcement: batches of prompts, a module that learns to brighten pictures, and its training loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from micro import Brightness
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.batches import ImageBatch
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.algorithms import DiffusionNFT
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Sampling
from lightning_modules.schedule import AdamW

SAMPLING = Sampling(group_size=3, groups=4, micro_groups=2, num_inference_steps=4)


def prompts(number: int, task: str = "edit", count: int = 4, width: int = 32) -> ImageBatch:
    """The number-th batch: instructions or captions, with random pictures 32 pixels high."""
    generator = torch.Generator().manual_seed(number)
    target = torch.rand(count, 3, 32, width, generator=generator) * 2 - 1
    references = torch.rand(count, 1, 3, 32, width, generator=generator) * 2 - 1
    return ImageBatch(
        tasks=[task] * count,
        keys=[f"k{number}-{i}" for i in range(count)],
        sample_ids=torch.arange(count) + 10 * number,
        epochs=torch.zeros(count, dtype=torch.int64),
        prompts=[f"make it {i}" for i in range(count)],
        target=target,
        references=references if task == "edit" else None,
    )


def made(folder: str, algorithm: object = DiffusionNFT(), reward: object = None, **changes: object) -> ReinforceModule:
    """A module with small settings."""
    settings = {
        "sampling": SAMPLING,
        "optimizer": AdamW(lr=1e-3, warmup_steps=0, weight_decay=0.0),
        "steps": 10,
        **changes,
    }
    rewards = {"bright": Weighted(Brightness() if reward is None else reward)}
    return ReinforceModule(folder, rewards, algorithm, **settings)


class Stream(IterableDataset):
    """Batches without a length, which Lightning would count a resumed run's batches against."""

    def __init__(self, batches: Sequence[ImageBatch]) -> None:
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


class SaveAfter(L.Callback):
    """Saves a checkpoint after so many batches, wherever the updates are."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.batches -= 1
        if not self.batches:
            trainer.save_checkpoint(self.path)


def trained(
    module: L.LightningModule,
    batches: Sequence[Any],
    steps: int,
    root: Path,
    callbacks: Sequence[L.Callback] = (),
    resume: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Trains on the batches until there were so many optimiser steps; `options` are the Trainer's."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(Stream(batches), batch_size=None), ckpt_path=resume)
    return trainer


def watched(module: ReinforceModule) -> list[list[str]]:
    """The keys of the groups that each update learns from."""
    found: list[list[str]] = []
    improve = module.improve

    def noted(rollouts: list[Rollout], batch: ImageBatch) -> None:
        found.append([key for rollout in rollouts for key in rollout.keys])
        improve(rollouts, batch)

    module.improve = noted
    return found
