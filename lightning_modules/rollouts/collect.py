"""Sampling groups of pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import draw
from lightning_modules.rollouts.policy import Policy
from lightning_modules.samplers import sde
from lightning_modules.samplers.ode import Solver
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
    solver: Solver | None = None,
) -> Trajectory:
    """Pictures of each prompt, from noise that is a function of (seed, epoch, sample, member, step) alone.

    `solver` takes the steps that are not stochastic; None is "dpm2" where none is, "euler" beside stochastic ones.
    """
    epochs, ids = repeated(batch, group_size)

    def noise(purpose: str) -> Tensor:
        return draw(torch.randn, shape, seed, purpose, epochs, ids).to(policy.sequence.device)

    if solver is None:
        solver = "dpm2" if stochastic is None else "euler"
    steps = lambda i: noise(f"rollout step {i}")  # noqa: E731
    return sde.sample(policy, noise("rollout"), sigmas, stochastic, window, steps, solver)
