"""R1V2's Selective Sample Buffer (arXiv 2504.16656): answers that still teach something, kept for later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.rollouts.chains import Answer


@dataclass
class SampleBuffer:
    """Answers whose advantage is not zero; each update learns from some of them beside what is new.

    As training goes on, groups whose answers are all right or all wrong become many and updates small; answers kept
    from before fill them up. Their log-probabilities stay those of the policy that sampled them. They lie on the
    CPU: pictures of 4,096 answers would fill a GPU.

    Attributes:
        capacity: answers kept; the oldest go first.
        share: of an update's answers that come from here, where there are as many.
        max_age: updates after which an answer is dropped: its policy is too far away.
    """

    capacity: int = 512
    share: float = 0.25
    max_age: int = 8
    answers: list[Answer] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 0 < self.share < 1 or self.max_age < 1:
            raise InputError(f"buffer: capacity and max_age are at least 1, share is between 0 and 1; got {self}")

    def weights(self) -> Float[Tensor, " n"]:
        """Probability of each answer to be drawn: |A| over the sum of all."""
        sizes = torch.tensor([abs(answer.advantage) for answer in self.answers], dtype=torch.float64)
        return sizes / sizes.sum()

    def wanted(self, fresh: int) -> int:
        """How many answers to draw beside `fresh` new ones."""
        return min(len(self.answers), round(fresh * self.share / (1 - self.share)))

    def draw(self, count: int, generator: torch.Generator) -> list[Answer]:
        """Different answers, by weight."""
        if not count:
            return []
        return [self.answers[i] for i in torch.multinomial(self.weights(), count, generator=generator).tolist()]

    def keep(self, fresh: list[Answer], update: int) -> None:
        """Adds what has an advantage, and drops what is too old or too much."""
        kept = [a for a in self.answers if update - a.update < self.max_age] + [a for a in fresh if a.advantage]
        self.answers = kept[-self.capacity :]

    def state(self) -> list[dict[str, Any]]:
        """For checkpoints."""
        return [answer.state() for answer in self.answers]
