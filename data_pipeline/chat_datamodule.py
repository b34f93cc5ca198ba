"""Conversations to a Trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from data_pipeline import chat, chat_plan, options
from data_pipeline.chat import Chat, ChatDataset
from data_pipeline.chat_batches import ChatBatch
from data_pipeline.chat_plan import PackedPlan
from data_pipeline.datamodule import build_missing, scene_folder
from data_pipeline.dataset import PlanSampler, TimedLoader, Verify, single_thread
from data_pipeline.errors import InputError
from data_pipeline.plan import Plan, PlannedBatch
from data_pipeline.recipe import Recipe
from data_pipeline.scenes import questions as texts
from data_pipeline.sources import SceneQuestions, questions


@dataclass
class QuestionShards:
    """Shards of questions about scenes (`sources.SceneQuestions`) that `fit` builds itself where they are missing."""

    level: int = 1
    counts: dict[str, int] = field(default_factory=lambda: {"short": 8192})
    flawed: float = 0.0
    words: bool = False
    kinds: list[str] | None = None
    seed: int = 0
    root: str = "data/scenes"

    def recipe(self) -> Recipe:
        """The recipe that builds them."""
        return Recipe(SceneQuestions(self.level, self.counts, self.flawed, self.words, self.kinds, self.seed))

    def folder(self) -> Path:
        """Where they lie: other code that writes the records, or their texts, gives another name."""
        code = [Path(file).read_bytes() for file in (questions.__file__, texts.__file__)]
        name = f"questions{self.level}-{hashlib.sha256(b''.join(code)).hexdigest()[:8]}"
        return scene_folder(Path(self.root), name, self.recipe())

    def build(self) -> None:
        """Builds them where they are missing."""
        build_missing(self.folder(), self.recipe())


class ChatDataModule(L.LightningDataModule):
    """Serves conversations, with pictures or without, from folders of shards.

    Args:
        shards: folders of shards.
        scenes: shards of questions about scenes, built where missing; one or several.
        batch_size: conversations a batch and rank.
        batch_tokens: tokens a batch and rank, at most, instead of `batch_size` in training: the model's context packs
            one row full. A stage that learns from conversations measures them when it begins.
        minimum: least value of scores by their names in the metadata, {score: 4}.
        equal: what fields of the metadata must be, {style: chain}.
        num_workers: processes that decode; 0 decodes in a thread of this one.
        seed: of the order.
        steps: batches of the whole run: optimiser steps x accumulation.
        val_fraction: share of records without a split of their own that is held out, chosen by their ids.
        val_batches: validation batches.
        verify: when the hash of each picture that is read is compared with the index.
    """

    def __init__(
        self,
        shards: list[str] | None = None,
        scenes: QuestionShards | list[QuestionShards] | None = None,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        minimum: dict[str, float] | None = None,
        equal: dict[str, Any] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        steps: int = 1000,
        val_fraction: float = 0.02,
        val_batches: int = 4,
        verify: Verify = "first_epoch",
    ) -> None:
        super().__init__()
        if not shards and not scenes:
            raise InputError("there is no data: set data.shards to folders of shards, or data.scenes")
        options.check_least(1, batch_size=batch_size, batch_tokens=batch_tokens, steps=steps)
        options.check_least(0, num_workers=num_workers, val_batches=val_batches)
        options.check_held_out(val_fraction)
        self.scenes = scenes if isinstance(scenes, list) else [scenes] if scenes else []
        self.shards, self.batch_size, self.batch_tokens = shards or [], batch_size, batch_tokens
        self.lengths: Sequence[int] | None = None  # tokens of each training conversation, once they are measured
        self.minimum, self.equal = minimum or {}, equal or {}
        self.num_workers, self.seed, self.steps, self.verify = num_workers, seed, steps, verify
        self.val_fraction, self.val_batches = val_fraction, val_batches
        self.train: list[Chat] = []
        self.val: list[Chat] = []
        self.wrong: list[int] | None = None  # ids that an iteration adds to its data; None before they are known
        self.consumed: Plan | PackedPlan | None = None
        self._restored: dict[str, Any] | None = None
        self._total = 0

    def prepare_data(self) -> None:
        """Builds missing shards of scenes (rank 0)."""
        for shards in self.scenes:
            shards.build()

    def setup(self, stage: str) -> None:
        """Reads which conversations there are."""
        if not self.train:
            folders = [*self.shards, *(str(shards.folder()) for shards in self.scenes)]
            chats = chat.load_chats(folders, self.minimum, self.equal)
            self.train, self.val = chat.parts(chats, self.val_fraction)
            self._total = len(self.train)
            if not self.train:
                raise InputError(f"all {len(chats)} conversations are held out; lower data.val_fraction")

    def narrow(self, score: str, threshold: float) -> None:
        """Trains on what reaches a score, and on what `wrong` names; before the loader is made."""
        self.train = chat.chosen(self.train, score, threshold, set(self.wrong or ()))
        if not self.train:
            raise InputError(f"no conversation has a {score} of {threshold:g}, and none was answered wrongly")

    def train_dataloader(self) -> TimedLoader:
        """The order from where training stands."""
        if self.batch_tokens is not None and self.lengths is None:
            raise InputError(
                "data.batch_tokens is for stages that measure conversations, such as reasoning.R1VModule; this one "
                "asks questions, set data.batch_size"
            )
        self.consumed = self.plan()
        if self._restored is not None:
            self.consumed.load_state_dict(self._restored)
        sampler = PlanSampler(self._planned, self._length)
        return TimedLoader(chat_loader(ChatDataset(self.train, self.verify), sampler, self.num_workers, self.seed))

    def plan(self) -> Plan | PackedPlan:
        """The order of this rank's batches from the beginning."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_tokens is not None and self.lengths is not None:
            return PackedPlan(self.lengths, self.batch_tokens, self.seed, rank, world)
        return chat_plan.plan(len(self.train), self.batch_size, self.seed, rank, world)

    def _planned(self) -> Iterator[PlannedBatch]:
        """Batches from where training stands to the end of the run."""
        plan, behind = self.plan(), 0
        assert self.consumed is not None
        plan.load_state_dict(self.consumed.state_dict())
        if self.trainer is not None:
            behind = self.trainer.global_step * self.trainer.accumulate_grad_batches
        for _ in range(self.steps - behind):
            yield next(plan)

    def _length(self) -> int:
        """Batches of the whole run as Lightning counts them: those behind, which may be more than its steps, and those
        to come."""
        if self.trainer is None:
            return self.steps
        behind = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return behind + self.steps - self.trainer.global_step * self.trainer.accumulate_grad_batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes that a batch is about to be trained on: what a checkpoint holds is never what was only prefetched."""
        if self.trainer is not None and self.trainer.training and isinstance(batch, ChatBatch):
            assert self.consumed is not None
            self.consumed.advance()
        return batch

    def val_dataloader(self) -> DataLoader[ChatBatch]:
        """Fixed batches of held-out conversations, of every style; of training ones where none is held out."""
        pool = self.val or self.train
        count = min(self.val_batches * self.batch_size, len(pool))
        held = [pool[i * len(pool) // count] for i in range(count)]
        planned = list(chat.plan_in_order(len(held), self.batch_size))
        return chat_loader(ChatDataset(held), PlanSampler(partial(iter, planned), planned.__len__), 0, self.seed)

    def state_dict(self) -> dict[str, Any]:
        """How many conversations were trained on, and what an iteration added; equal on all ranks."""
        plan = self._restored if self.consumed is None else self.consumed.state_dict()
        return {"plan": plan, "wrong": self.wrong, "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint stood: other ranks and batch sizes may, other conversations may not."""
        if self.train and state["total"] != len(self.train):
            raise InputError(
                f"the checkpoint was trained on {state['total']} conversations, there are now {len(self.train)}; "
                "resume with the run's own config.yaml, or start a new run"
            )
        self._restored, self.wrong = state["plan"], state["wrong"]


def chat_loader(dataset: ChatDataset, sampler: PlanSampler, workers: int, seed: int) -> DataLoader[ChatBatch]:
    """Batches of conversations, made by processes or, without workers, when they are asked for."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=single_thread if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
