"""Deterministic sampling: the probability flow dx = v dsigma, from noise to data."""

from __future__ import annotations

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
