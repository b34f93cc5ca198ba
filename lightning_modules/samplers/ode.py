"""Deterministic sampling: the probability flow dx = v dsigma, from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler_step(
    x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], sigma: float | Tensor, next_sigma: float | Tensor
) -> Float[Tensor, "b ..."]:
    """x(next) = x + (next - sigma) v."""
    return x + (next_sigma - sigma) * v


def euler(velocity: Velocity, x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "b ..."]:
    """Walks `sigmas` (from 1 to 0) with one velocity(x, sigma (B,)) a step; x stays in fp32."""
    x = x.float()
    for sigma, following in sigmas.unfold(0, 2, 1):
        v = velocity(x, sigma.expand(len(x)).to(x.device)).float()
        x = euler_step(x, v, sigma.item(), following.item())
    return x


# DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with alpha = 1 - sigma.
def dpm_solver_2(velocity: Velocity, x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "b ..."]:
    """Walks `sigmas` (from 1 to 0) with one velocity a step, to second order; the first and the last step are of first.

    lambda = log(alpha / sigma) is infinite at both ends, where a step of second order has no meaning.
    """
    x = x.float()
    levels = sigmas.double().tolist()
    denoised: Tensor | None = None
    for i in range(len(levels) - 1):
        sigma, following = levels[i], levels[i + 1]
        v = velocity(x, sigmas[i].expand(len(x)).to(x.device)).float()
        before, denoised = denoised, x - sigma * v
        target = denoised
        if before is not None and following > 0 and levels[i - 1] < 1:
            earlier, now, later = (math.log((1 - s) / s) for s in (levels[i - 1], sigma, following))
            target = denoised + (later - now) / (2 * (now - earlier)) * (denoised - before)
        decay = following / sigma
        x = decay * x + (1 - following - decay * (1 - sigma)) * target
    return x
