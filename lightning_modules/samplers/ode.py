"""Deterministic sampling: the probability flow dx = v dsigma, from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "dpm2"]


def euler_step(
    x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], sigma: float | Tensor, next_sigma: float | Tensor
) -> Float[Tensor, "b ..."]:
    """x(next) = x + (next - sigma) v."""
    return x + (next_sigma - sigma) * v


# DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with alpha = 1 - sigma.
def dpm_step(
    x: Float[Tensor, "b ..."],
    v: Float[Tensor, "b ..."],
    levels: Sequence[float],
    i: int,
    before: Float[Tensor, "b ..."] | None,
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """The next state, and x0 as it is predicted here; `before` as step i - 1 predicted it, None where it is not known.

    Of second order where that is known, but for the first and the last step: lambda = log(alpha / sigma) is infinite at
    both ends, where a step of second order has no meaning.
    """
    sigma, following = levels[i], levels[i + 1]
    denoised = x - sigma * v
    target = denoised
    if before is not None and following > 0 and levels[i - 1] < 1:
        earlier, now, later = (math.log((1 - s) / s) for s in (levels[i - 1], sigma, following))
        target = denoised + (later - now) / (2 * (now - earlier)) * (denoised - before)
    decay = following / sigma
    return decay * x + (1 - following - decay * (1 - sigma)) * target, denoised


def step(
    solver: Solver,
    x: Float[Tensor, "b ..."],
    v: Float[Tensor, "b ..."],
    levels: Sequence[float],
    i: int,
    before: Float[Tensor, "b ..."] | None,
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."] | None]:
    """Step i of a solver: the next state, and what the next step takes as `before`."""
    if solver == "euler":
        return euler_step(x, v, levels[i], levels[i + 1]), None
    return dpm_step(x, v, levels, i, before)


def walk(
    solver: Solver, velocity: Velocity, x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"]
) -> Float[Tensor, "b ..."]:
    """Walks `sigmas` with one velocity(x, sigma (B,)) a step; x stays in fp32."""
    x, levels = x.float(), sigmas.tolist()
    before: Tensor | None = None
    for i in range(len(levels) - 1):
        v = velocity(x, sigmas[i].expand(len(x)).to(x.device)).float()
        x, before = step(solver, x, v, levels, i, before)
    return x


def euler(velocity: Velocity, x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "b ..."]:
    """Walks `sigmas` (from 1 to 0) to first order."""
    return walk("euler", velocity, x, sigmas)


def dpm_solver_2(velocity: Velocity, x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "b ..."]:
    """Walks `sigmas` (from 1 to 0) to second order; the first and the last step are of first."""
    return walk("dpm2", velocity, x, sigmas)
