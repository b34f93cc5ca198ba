"""Random draws as counters: every draw is a function of (seed, purpose, epoch, sample id).

Never of rank, worker or step, so that resuming, more ranks or another accumulation draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def counter_seed(seed: int, purpose: str, epoch: int, sample_id: int) -> int:
    """Mixes the four counters into 63 bits with blake2b, so that neighbouring counters share no structure."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, epoch: int, sample_id: int) -> torch.Generator:
    """A CPU generator for one draw. The CPU's is used on every device, so that all devices draw the same."""
    return torch.Generator().manual_seed(counter_seed(seed, purpose, epoch, sample_id))


def draw(
    sampler: Callable[..., Tensor], shape: Sequence[int], seed: int, purpose: str, epochs: Tensor, sample_ids: Tensor
) -> Tensor:
    """Stacks one draw per sample: `sampler` is torch.randn or torch.rand, the result (B, *shape), float32, on the CPU.

    >>> draw(torch.rand, (), 0, "sigma", torch.tensor([0, 0]), torch.tensor([7, 7])).unique().numel()
    1
    """
    sources = [generator(seed, purpose, e, i) for e, i in zip(epochs.tolist(), sample_ids.tolist(), strict=True)]
    return torch.stack([sampler(tuple(shape), generator=source, dtype=torch.float32) for source in sources])
