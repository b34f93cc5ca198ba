"""Settings of reinforcement on answers: how much is sampled, how long answers may be, and how rewards are weighed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.rewards.answers import TextReward, soft_overlong
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import check_weight, numbers

OVERLONG = "overlong"


@dataclass
class ChainSampling:
    """How answers are sampled to learn from.

    Attributes:
        group_size: answers to each question, G.
        groups: groups that an iteration learns from, on all devices together; questions are asked until so many teach
            something.
        micro_answers: answers in one batch while learning.
        updates: optimiser steps that an iteration's answers are split into; after the first the policy has moved.
        max_new_tokens: of an answer.
        temperature: of the draws, and of the log-probabilities that are compared.
    """

    group_size: int = 8
    groups: int = 8
    micro_answers: int = 8
    updates: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        least = min(self.groups, self.micro_answers, self.updates, self.max_new_tokens)
        if self.group_size < 2 or least < 1 or self.temperature <= 0:
            raise InputError(
                f"sampling: a group has at least 2 answers, all else is at least 1, temperature above 0; got {self}"
            )
        if self.groups % self.updates or self.micro_answers % 2:
            raise InputError(
                f"sampling: groups {self.groups} must be a multiple of updates {self.updates}, and micro_answers "
                f"{self.micro_answers} even, so that pairs stay together"
            )

    def share(self, devices: int) -> int:
        """Groups of a device in each of an iteration's updates.

        InputError where they cannot be shared out evenly, which names the nearest numbers of groups that can.
        """
        unit = devices * self.updates
        if self.groups % unit:
            below = self.groups // unit * unit
            near = " or ".join(str(n) for n in (below, below + unit) if n)
            raise InputError(
                f"sampling.groups {self.groups} must be a multiple of {devices} devices x {self.updates} updates; take "
                f"{near}"
            )
        return self.groups // unit


@dataclass
class Overlong:
    """What becomes of answers that are cut off, and of long ones (DAPO, arXiv 2503.14476, section 3.4).

    Attributes:
        cut_off: "mask": they count in their group and are not learned from; "learn": they are learned from.
        buffer: tokens below the limit from which on a reward falls to -1; 0 punishes none.
        weight: of that reward.
    """

    cut_off: Literal["mask", "learn"] = "mask"
    buffer: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer < 0:
            raise InputError(f"overlong: buffer is at least 0 tokens, got {self.buffer}")

    def punished(self, lengths: Sequence[int], longest: int) -> dict[str, Float[Tensor, " b"]]:
        """The reward of lengths, where it is asked for."""
        if not self.buffer:
            return {}
        punished = [soft_overlong(n, longest, self.buffer) for n in lengths]
        return {OVERLONG: torch.tensor(punished, dtype=torch.float32)}


@dataclass
class WeightedText:
    """A reward of answers, and what it counts. One of weight 0 is logged and teaches nothing."""

    reward: TextReward
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)


def scored(
    rewards: Mapping[str, WeightedText], texts: Sequence[str], requests: Sequence[Request]
) -> dict[str, Float[Tensor, " b"]]:
    """Each reward's numbers by name; NaN where there is none."""
    return {
        name: numbers(name, partial(each.reward.score, texts, requests), len(requests))
        for name, each in rewards.items()
    }


def reasons(rewards: Mapping[str, WeightedText]) -> Counter[str]:
    """How often each verdict came since this was last asked, of rewards that name them."""
    found: Counter[str] = Counter()
    for each in rewards.values():
        if isinstance(counts := getattr(each.reward, "counts", None), Counter):
            found += counts
            counts.clear()
    return found


def required(rewards: Mapping[str, WeightedText]) -> tuple[str, ...]:
    """What a record's metadata must hold to be scored, by rewards that say so."""
    return tuple(dict.fromkeys(name for each in rewards.values() for name in getattr(each.reward, "requires", ())))
