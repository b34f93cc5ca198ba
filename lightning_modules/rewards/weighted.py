"""Several rewards of a picture, each with its weight and its tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.rewards.protocol import Request, Reward

logger = logging.getLogger(__name__)


@dataclass
class Weighted:
    """A reward, what it counts, and the tasks it judges (None: all). One of weight 0 is logged and teaches nothing, so
    that a learned reward can be watched beside the truth on the same pictures. `beside`: further pictures are sampled
    while these are scored; set it to false for a reward that takes the cores which sample."""

    reward: Reward
    weight: float = 1.0
    tasks: list[str] | None = None
    beside: bool = True

    def __post_init__(self) -> None:
        check_weight(self.weight)


def check_weight(weight: float) -> None:
    """Refuses what no number can be multiplied by."""
    if not math.isfinite(weight):
        raise InputError(f"the weight of a reward is {weight}; expected a finite number")


def judge(rewards: Mapping[str, Weighted], task: str) -> bool:
    """Whether one of the rewards teaches anything of a task."""
    return any(each.weight and (each.tasks is None or task in each.tasks) for each in rewards.values())


def of_task(rewards: Mapping[str, Weighted], task: str) -> dict[str, Weighted]:
    """The rewards of a task; an InputError where none judges it."""
    found = {name: each for name, each in rewards.items() if each.tasks is None or task in each.tasks}
    if not judge(found, task):
        raise InputError(
            f"no reward judges the task {task!r}; name it in the tasks of one of {', '.join(rewards)} that has a weight"
        )
    return found


def score(
    rewards: Mapping[str, Weighted], pictures: Float[Tensor, "b 3 h w"], requests: Sequence[Request]
) -> dict[str, Float[Tensor, " b"]]:
    """Each reward's numbers by name; NaN where there is none. A failure is told apart from every number."""
    return {
        name: numbers(name, partial(each.reward.score, pictures, requests), len(requests))
        for name, each in rewards.items()
    }


def numbers(name: str, score: Callable[[], list[float | None]], count: int) -> Float[Tensor, " b"]:
    """What a reward said of `count` things; NaN where it said nothing, or failed."""
    values: list[float | None]
    try:
        values = score()
        if len(values) != count:
            raise ValueError(f"{len(values)} scores for {count}")
    except InputError:
        raise
    except Exception as error:  # whatever a reward may raise, its groups are left out, and the run goes on
        logger.warning("the reward %s failed for %d: %s: %s", name, count, type(error).__name__, error)
        values = [None] * count
    found = [float("nan") if value is None or not math.isfinite(value) else float(value) for value in values]
    return torch.tensor(found, dtype=torch.float32)
