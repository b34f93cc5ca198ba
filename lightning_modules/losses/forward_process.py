"""Online RL on the forward process: only what was sampled is needed, not how. One value a sample."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "b ..."]
Samples = Float[Tensor, " b"]


def optimality(advantages: Samples, limit: float) -> Samples:
    """Advantages within [-limit, limit] to [0, 1] (DiffusionNFT, arXiv 2509.16117, equation 9)."""
    return (advantages / (2 * limit) + 0.5).clamp(0, 1)


# DiffusionNFT (arXiv 2509.16117), equation 5, with the weighting of its appendix (1 / |x0 error|, no gradient).
def diffusion_nft(positive: Images, negative: Images, x0: Images, r: Samples, beta: float) -> Samples:
    """r |x0(v+) - x0|^2 + (1 - r) |x0(v-) - x0|^2, over beta."""
    return (r * normalised_error(positive, x0) + (1 - r) * normalised_error(negative, x0)) / beta


def contrast(v: Images, v_old: Images, beta: float) -> tuple[Images, Images]:
    """v+ = beta v + (1 - beta) v_old, v- = (1 + beta) v_old - beta v: beta towards v from v_old, and away."""
    return beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v


def normalised_error(found: Images, x0: Images) -> Samples:
    """Mean squared error over the mean absolute error, which is no part of the gradient."""
    error = (found - x0).flatten(1)
    weight = error.detach().double().abs().mean(dim=1).clamp_min(1e-5).to(error.dtype)
    return error.square().mean(dim=1) / weight


# Advantage-weighted matching (arXiv 2509.25050), with the generalised Huber loss of its code.
def matching_log_prob(v: Images, target: Images, sigma: Samples, power: float = 0.25) -> Samples:
    """-((m + e)^p - e^p) sigma / p of the mean squared error m of a velocity, e = 1e-10, in double precision."""
    m = (v.double() - target.double()).square().flatten(1).mean(dim=1)
    return -((m + 1e-10) ** power - 1e-10**power) * sigma.double() / power


# Velocity KL, as UniGRPO (arXiv 2603.23500) puts it in the place of the latent one.
def velocity_divergence(v: Images, reference: Images) -> Samples:
    """Mean squared difference of two velocities."""
    return (v - reference).square().flatten(1).mean(dim=1)
