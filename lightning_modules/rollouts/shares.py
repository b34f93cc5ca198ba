"""What each device holds of its own between updates, in one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch.distributed as dist

Holding = dict[str, Any]  # plain data, and tensors on the CPU


def gathered(own: Holding) -> list[Holding]:
    """What each device holds, by rank; every device must ask, and the first, which writes checkpoints, is told."""
    rank, size = place()
    if size == 1:
        return [own]
    found: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(own, found, group=on_cpus(dist.get_backend()))
    return found or []


@cache
def on_cpus(backend: str) -> Any:
    """Processes that talk without GPUs, whose memory would have to hold all of it; None where they do anyway."""
    return None if backend == "gloo" else dist.new_group(backend="gloo")


def share(saved: Sequence[Holding], name: str) -> list[Any]:
    """This device's part of a list that each device saved: its own, or, where there were more or fewer devices, every
    size-th entry of all their lists together, so that nothing is lost and nothing learned from twice."""
    rank, size = place()
    if len(saved) == size:
        return list(saved[rank][name])
    return [entry for each in saved for entry in each[name]][rank::size]


def beside(saved: Sequence[Holding], name: str) -> Any:
    """What this device saved; where there were fewer devices, what one of them did, all being equally good."""
    return saved[place()[0] % len(saved)][name]


def counted(saved: Sequence[Holding], name: str) -> int:
    """This device's count; where there were more or fewer devices, an equal part of all their counts together."""
    rank, size = place()
    return int(saved[rank][name] if len(saved) == size else sum(each[name] for each in saved) // size)


def place() -> tuple[int, int]:
    """Rank of this device, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
