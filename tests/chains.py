"""Micro reinforcement of answers: an untrained R1V folder, batches of questions, and a module on them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from micro_r1v import micro_r1v, root

from data_pipeline.chat_batches import ChatBatch
from lightning_modules.pipelines.answering import TransformersEngine
from lightning_modules.reasoning_grpo import ReasoningGrpoModule
from lightning_modules.rewards.protocol import Request
from lightning_modules.rollouts.chain_algorithms import TokenGRPO
from lightning_modules.rollouts.chain_settings import ChainSampling, Overlong, WeightedText
from lightning_modules.schedule import AdamW

SAMPLING = ChainSampling(group_size=4, groups=2, micro_answers=4, max_new_tokens=6)


@functools.cache
def folder() -> str:
    """An R1V folder for the whole test session, in all of its processes."""
    if found := os.environ.get("MICRO_R1V"):
        return found
    target = root() / "r1v"
    micro_r1v().save_pretrained(target)
    return str(target)


def asked(number: int, count: int = 2) -> ChatBatch:
    """The number-th batch: questions about random pictures."""
    generator = torch.Generator().manual_seed(number)
    pictures = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return ChatBatch(
        keys=[f"k{number}-{i}" for i in range(count)],
        sample_ids=torch.arange(count) + 10 * number,
        epochs=torch.zeros(count, dtype=torch.int64),
        turns=[(("user", f"<image>\nhow many? {i}"), ("assistant", "two")) for i in range(count)],
        pictures=[[picture] for picture in pictures],
        metadata=[{"answer": "2"} for _ in range(count)],
    )


class Vowels:
    """A reward that any policy can raise: the share of its characters that are an e."""

    def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
        return [text.count("e") / max(1, len(text)) for text in texts]


def grpo(reward: object = None, **changes: object) -> ReasoningGrpoModule:
    """A module with small settings."""
    settings: dict[str, object] = {"overlong": Overlong(cut_off="learn")}  # barely trained, it never comes to an end
    settings |= {"sampling": SAMPLING, "optimizer": AdamW(lr=1e-2, warmup_steps=0, weight_decay=0.0), "steps": 10}
    settings |= {"algorithm": TokenGRPO(), "engine": TransformersEngine()}
    rewards = {"vowels": WeightedText(Vowels() if reward is None else reward)}
    return ReasoningGrpoModule(folder(), rewards, **{"context": 128, **settings, **changes})
