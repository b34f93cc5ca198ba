"""Named algorithms that learn from groups of answers: what they take from a group, and the loss of a batch of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.losses.policy_gradient import clip_higher, dual_clip
from lightning_modules.losses.preference import bco, dpo, likelihood, mixed_preference
from lightning_modules.losses.token_policy import Aggregate, Estimator, aggregated, divergence
from lightning_modules.rollouts.chains import Answer, Batch


class Totals(NamedTuple):
    """Of a whole update, on average over devices: tokens that are learned from, and answers."""

    tokens: float
    answers: float


@runtime_checkable
class ChainAlgorithm(Protocol):
    """An algorithm."""

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the reference are needed."""

    def choose(self, group: list[Answer]) -> list[Answer]:
        """What an update learns from of a group; answers that belong together stand together."""

    def loss(self, new: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch's part of an update's loss, from (B, T) log-probabilities, and what to log of it."""


@dataclass
class TokenGRPO:
    """GRPO (arXiv 2402.03300) by tokens, with DAPO's clip-higher and averaging (arXiv 2503.14476).

    Attributes:
        clip_low, clip_high: ratios are kept within 1 - clip_low and 1 + clip_high.
        dual_clip: the largest ratio that a negative advantage is multiplied by; None for no limit.
        aggregate: "token": each token counts alike; "sequence": each answer does; "constant": Dr. GRPO's.
        kl: weight of the divergence from the reference; 0 needs none.
        estimator: of that divergence.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregate: Aggregate = "token"
    kl: float = 0.0
    estimator: Estimator = "k3"

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.kl < 0:
            raise InputError(f"TokenGRPO: 0 < clip_low < 1, clip_high above 0, kl at least 0; got {self}")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise InputError(f"TokenGRPO: dual_clip is above 1 + clip_high, or null; got {self.dual_clip}")

    @property
    def needs_reference(self) -> bool:
        """For the divergence alone."""
        return self.kl > 0

    def choose(self, group: list[Answer]) -> list[Answer]:
        """All of them."""
        return group

    def loss(self, new: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        # A masked token has no log-probability of its own; exp of what stands there could be infinite.
        log_ratio = torch.where(batch.mask > 0, new - batch.old, 0.0)
        ratio, advantages = log_ratio.exp(), batch.advantages[:, None].expand_as(new)
        losses = clip_higher(ratio, advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            losses = dual_clip(losses, advantages, self.dual_clip)
        metrics = self.watched(ratio.detach(), log_ratio.detach(), batch)
        if batch.reference is not None and self.kl > 0:
            away = divergence(torch.where(batch.mask > 0, new, batch.reference), batch.reference, self.estimator)
            losses = losses + self.kl * away
            metrics["kl"] = average(away.detach(), batch.mask)
        return aggregated(losses, batch.mask, self.aggregate, *totals, batch.longest), metrics

    def watched(self, ratio: Tensor, log_ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Ratios, and the shares of tokens that each limit holds back."""
        up = (ratio > 1 + self.clip_high) & (batch.advantages[:, None] > 0)
        down = (ratio < 1 - self.clip_low) & (batch.advantages[:, None] < 0)
        return {
            "ratio_mean": average(ratio, batch.mask),
            "ratio_off": torch.where(batch.mask > 0, (ratio - 1).abs(), 0.0).max(),
            "clipped_high": average(up.float(), batch.mask),
            "clipped_low": average(down.float(), batch.mask),
            "old_kl": average(torch.expm1(log_ratio) - log_ratio, batch.mask),
        }


@dataclass
class MixedPreference:
    """R1V2's mixed preference optimisation (arXiv 2504.16656; MPO, arXiv 2411.10442) on pairs of sampled answers.

    R1V2 does not give its weights; these are MPO's.

    Attributes:
        weights: of DPO, BCO and the chosen answer's likelihood.
        beta: of the implicit reward, beta times the log-ratio to the reference.
        margin: of a pair's rewards, at the least.
        shift_decay: of BCO's moving average of implicit rewards.
        cut_off: whether answers that were cut off may be of a pair.
    """

    weights: tuple[float, float, float] = (0.8, 0.2, 1.0)
    beta: float = 0.1
    margin: float = 0.0
    shift_decay: float = 0.9
    cut_off: bool = False
    shift: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if min(self.weights) < 0 or sum(self.weights) == 0 or self.beta <= 0 or not 0 <= self.shift_decay < 1:
            raise InputError(f"MixedPreference: weights and beta are positive, 0 <= shift_decay < 1; got {self}")

    @property
    def needs_reference(self) -> bool:
        """Implicit rewards are measured against it."""
        return True

    def choose(self, group: list[Answer]) -> list[Answer]:
        """The best and the worst answer that came to an end, in this order; the first of equals. None where they are
        too near."""
        ended = [answer for answer in group if answer.ended or self.cut_off]
        if not ended:
            return []
        best, worst = (pick(ended, key=lambda answer: answer.reward) for pick in (max, min))
        return [best, worst] if best.reward - worst.reward > self.margin else []

    def loss(self, new: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.reference is not None
        summed = torch.where(batch.mask > 0, new, 0.0).sum(dim=1)
        ratios = summed - torch.where(batch.mask > 0, batch.reference, 0.0).sum(dim=1)
        chosen, rejected = ratios[0::2], ratios[1::2]
        quality = bco(chosen, torch.ones_like(chosen), self.beta, self.shift)
        quality = quality + bco(rejected, torch.zeros_like(rejected), self.beta, self.shift)
        terms = dpo(chosen, rejected, self.beta), quality, likelihood(summed[0::2], batch.lengths[0::2])
        self.shift = self.shift_decay * self.shift + (1 - self.shift_decay) * self.beta * ratios.detach().mean().item()
        metrics = {name: term.detach().mean() for name, term in zip(("dpo", "bco", "nll"), terms, strict=True)}
        metrics["preferred"] = (chosen > rejected).float().mean()
        return mixed_preference(*terms, self.weights).sum() / max(totals.answers / 2, 1.0), metrics


def average(values: Float[Tensor, "b t"], mask: Float[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean over tokens that are learned from."""
    return torch.where(mask > 0, values, 0.0).sum() / mask.sum().clamp_min(1)
