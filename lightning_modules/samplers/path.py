"""The one sign convention: sigma = 1 is noise, x_sigma = (1 - sigma) x0 + sigma eps, v = dx/dsigma = eps - x0.

Rectified flow, Liu et al. 2022 (arXiv 2209.03003); in this form Esser et al. 2024 (arXiv 2403.03206), section 3.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def per_sample(sigma: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Tensor:
    """Sigma shaped to broadcast over each sample: (B,) to (B, 1, ..., 1).

    Checked, because (B,) broadcasts silently against the last axis where that has B entries too.
    """
    if sigma.shape != like.shape[:1]:
        raise ValueError(f"sigma must have shape ({like.shape[0]},), one entry a sample; got {tuple(sigma.shape)}")
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(
    x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """x_sigma = (1 - sigma) x0 + sigma eps."""
    s = per_sample(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """v = eps - x0."""
    return noise - x0


def denoise(x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """x0 = x_sigma - sigma v."""
    return x - per_sample(sigma, x) * v


def renoise(x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """eps = x_sigma + (1 - sigma) v."""
    return x + (1 - per_sample(sigma, x)) * v
