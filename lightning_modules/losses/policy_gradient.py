"""Losses of ratio-based online RL, one value a sample. A ratio compares two policies on one recorded step.

The log-probabilities are means over elements, so ratios stay near 1 and clip ranges are small.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Samples = Float[Tensor, " b"]


# PPO, Schulman et al. 2017 (arXiv 1707.06347), equation 7; Flow-GRPO (arXiv 2505.05470), equation 4.
def ppo_clip(ratio: Samples, advantages: Samples, clip: float) -> Samples:
    """max(-A r, -A clip(r, 1 - c, 1 + c))."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


# Flow-DPPO (arXiv 2606.11025): a step is dropped once its divergence is large and its gradient would add to it.
def divergence_mask(ratio: Samples, advantages: Samples, divergence: Samples, limit: float) -> Samples:
    """-A r, and 0 where D >= limit and the ratio has moved the way the advantage pushes it."""
    outward = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    # Not a product: an infinite ratio times 0 is not a number.
    return torch.where((divergence >= limit) & outward, 0.0, -advantages * ratio)


def gaussian_divergence(
    mean: Float[Tensor, "b ..."], old_mean: Float[Tensor, "b ..."], std: float
) -> Float[Tensor, " b"]:
    """KL divergence of two Gaussians of one standard deviation, an element: mean (mu - mu_old)^2 / (2 s^2)."""
    return (mean - old_mean).square().flatten(1).mean(dim=1) / (2 * std**2)


# GRPO-Guard (arXiv 2510.22319), equations 8 and 11, as its code has them.
def guarded_ratio(log_ratio: Samples, divergence: Samples, std: float) -> Samples:
    """exp((log r + D) s): its mean no longer drifts below 1, and its spread no longer depends on the step."""
    return torch.exp((log_ratio + divergence) * std)


# DAPO (arXiv 2503.14476), equation 10: an upper limit of its own lets unlikely tokens grow.
def clip_higher(
    ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], low: float, high: float
) -> Float[Tensor, "b t"]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) of each token."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


# Dual-clip PPO (Ye et al. 2020, arXiv 1912.09729), equation 5.
def dual_clip(loss: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], limit: float) -> Float[Tensor, "b t"]:
    """Where A < 0, a clipped loss is at most -A limit: a ratio that exploded pushes no further."""
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * limit), loss)
