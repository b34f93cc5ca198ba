"""Rewards to advantages. All work on (P, G): P groups of G pictures made from one prompt (and its sources)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data_pipeline.errors import InputError

Groups = Float[Tensor, "p g"]


# GRPO (arXiv 2402.03300), section 4.1.2; UniPic 2.0 (arXiv 2509.04548), equation 1.
def group_normalised(rewards: Groups, floor: float = 1e-4) -> Groups:
    """(r - mean) / max(std, floor) of each group, std over its G members; exactly 0 where all are equal."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = torch.where(flat(rewards)[:, None], 0.0, centred)
    return centred / rewards.std(dim=1, keepdim=True, correction=0).clamp_min(floor)


# Pref-GRPO (arXiv 2508.20751): comparisons in place of scores, whose small differences mean nothing.
def win_rates(rewards: Groups, margin: float = 0.0) -> Groups:
    """Share of the others of its group that a picture beats by more than `margin`; a tie counts half."""
    difference = rewards[:, :, None] - rewards[:, None, :]
    wins = (difference > margin).float() + 0.5 * (difference.abs() <= margin).float()
    return (wins.sum(dim=2) - 0.5) / (rewards.shape[1] - 1)


# GDPO, as DeepGen (arXiv 2602.12205) has it: each reward is normalised before they are summed, so that none drowns.
def decoupled(
    rewards: Mapping[str, Groups], weights: Mapping[str, float], floor: float = 1e-4, every: Groups | None = None
) -> Groups:
    """Weighted sum of each reward's group-normalised advantages, divided by the std over all groups of such sums.

    Those are `every`, the `normalised_sum` of an update's groups; None takes those of `rewards`. A group with a member
    that has no reward (NaN) is NaN, and counts nothing in that of the others.
    """
    total = normalised_sum(rewards, weights, floor)
    every = total if every is None else every
    known = every[every.isfinite().all(dim=1)]
    return total / known.std(correction=0).clamp_min(floor) if known.numel() else total


def normalised_sum(rewards: Mapping[str, Groups], weights: Mapping[str, float], floor: float = 1e-4) -> Groups:
    """Weighted sum of each reward's group-normalised advantages."""
    return torch.stack([weights[name] * group_normalised(values, floor) for name, values in rewards.items()]).sum(0)


def flat(rewards: Groups) -> Bool[Tensor, " p"]:
    """Groups whose rewards are all equal: nothing can be learned from them."""
    return (rewards == rewards[:, :1]).all(dim=1)


@dataclass
class Advantages:
    """How rewards become advantages.

    Attributes:
        kind: "group": of the weighted sum, normalised in each group; "win_rate": of win rates; "decoupled": GDPO.
        std_floor: the least that differences are divided by.
        flat_below: groups whose rewards' standard deviation is at most this are dropped.
        limit: advantages are kept within it.
    """

    kind: Literal["group", "win_rate", "decoupled"] = "group"
    std_floor: float = 1e-4
    flat_below: float = 0.0
    limit: float = 5.0

    def __post_init__(self) -> None:
        if self.std_floor <= 0 or self.flat_below < 0 or self.limit <= 0:
            raise InputError(f"advantages: std_floor and limit must be above 0, flat_below at least 0; got {self}")

    def useful(self, total: Groups) -> Bool[Tensor, " p"]:
        """Groups that something can be learned from."""
        return ~flat(total) & (total.std(dim=1, correction=0) > self.flat_below)

    def __call__(
        self, rewards: Mapping[str, Groups], weights: Mapping[str, float], every: Groups | None = None
    ) -> Groups:
        """Advantages of groups by their rewards, each weighed; `every` as `decoupled` takes it."""
        if self.kind == "decoupled":
            found = decoupled(rewards, weights, self.std_floor, every)
        else:
            total = weighted_sum(rewards, weights)
            found = group_normalised(win_rates(total) if self.kind == "win_rate" else total, self.std_floor)
        return found.clamp(-self.limit, self.limit)


def weighted_sum(rewards: Mapping[str, Groups], weights: Mapping[str, float]) -> Groups:
    """One reward of several."""
    return torch.stack([weights[name] * values for name, values in rewards.items()]).sum(dim=0)
