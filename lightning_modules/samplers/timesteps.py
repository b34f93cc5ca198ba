"""Noise levels: which sigma to train on, and which to visit when sampling."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def logit_normal(
    u: Float[Tensor, "*b"], mean: float | Float[Tensor, "*b"] = 0.0, std: float = 1.0
) -> Float[Tensor, "*b"]:
    """Sigma = sigmoid(mean + std z) for uniform u, z its normal quantile (arXiv 2403.03206, equation 19)."""
    z = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).to(u.dtype)
    return torch.sigmoid(mean + std * z)


def shift(sigma: Float[Tensor, "*b"], factor: float) -> Float[Tensor, "*b"]:
    """Moves noise levels for a resolution: sigma' = a sigma / (1 + (a - 1) sigma) (arXiv 2403.03206, equation 23)."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def schedule(steps: int, factor: float = 1.0, train_steps: int = 1000) -> Float[Tensor, " n"]:
    """The steps + 1 noise levels that SD3's Euler sampler visits, from the noisiest to 0, fp32.

    Equal to diffusers' FlowMatchEulerDiscreteScheduler with a static shift: the ends of its table of `train_steps`
    levels are shifted, divided evenly, and shifted once more.
    """
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    low = float(shift(torch.tensor(1 / train_steps, dtype=torch.float64), factor))
    even = torch.linspace(1.0, low, steps, dtype=torch.float64)
    return torch.cat([shift(even, factor), torch.zeros(1, dtype=torch.float64)]).float()
