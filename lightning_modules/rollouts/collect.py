"""Sampling groups of pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import draw
from lightning_modules.rollouts.policy import Policy
from lightning_modules.samplers import ode, sde
from lightning_modules.samplers.sde import Stochastic, Trajectory


def repeated(batch: ImageBatch, group_size: int) -> tuple[Tensor, Tensor]:
    """Epochs and ids of B = P G pictures, group after group; each member of a group has an id of its own."""
    members = torch.arange(group_size).repeat(len(batch))
    ids = batch.sample_ids.repeat_interleave(group_size) * 4096 + members  # wraps, as hashes may
    return batch.epochs.repeat_interleave(group_size), ids


def sample(
    policy: Policy,
    shape: tuple[int, ...],
    batch: ImageBatch,
    group_size: int,
    sigmas: Float[Tensor, " n"],
    stochastic: Stochastic | None,
    window: tuple[int, int],
    seed: int,
) -> Trajectory:
    """Pictures of each prompt, from noise that is a function of (seed, epoch, sample, member, step) alone."""
    epochs, ids = repeated(batch, group_size)

    def noise(purpose: str) -> Tensor:
        return draw(torch.randn, shape, seed, purpose, epochs, ids).to(policy.sequence.device)

    start = noise("rollout")
    if stochastic is None:
        x0 = ode.dpm_solver_2(policy, start, sigmas)
        return Trajectory(sigmas, (0, 0), start[None], start.new_zeros(0, len(start)), x0)
    return sde.sample(policy, start, sigmas, stochastic, window, lambda i: noise(f"rollout step {i}"))
