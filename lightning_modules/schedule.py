"""AdamW with weight-decay groups, warm-up and cosine, from config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from data_pipeline.errors import InputError


@dataclass
class AdamW:
    """Settings of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and of its schedule.

    `weight_decay` applies to matrices and kernels only, never to biases, norms and other vectors.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer: lr and eps must be above 0, betas from 0 to below 1, got {self}")
        if min(self.weight_decay, self.warmup_steps, self.final_lr_ratio) < 0:
            raise InputError(f"optimizer: weight_decay, warmup_steps and final_lr_ratio must be 0 or more, got {self}")


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, final_ratio: float) -> float:
    """Learning rate as a share of its peak: linear from 1 / warmup_steps to 1, then half a cosine to final_ratio."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def weight_decay_groups(parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict]:
    """Two parameter groups: tensors of two or more dimensions decay, vectors and scalars do not."""
    named = list(parameters)
    return [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(
    parameters: Iterable[tuple[str, Parameter]], settings: AdamW, total_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimiser over (name, parameter) pairs and its schedule, stepped once an optimiser step."""
    groups = weight_decay_groups(parameters, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    rule = partial(
        warmup_cosine,
        warmup_steps=settings.warmup_steps,
        total_steps=total_steps,
        final_ratio=settings.final_lr_ratio,
    )
    return optimizer, LambdaLR(optimizer, lambda step: rule(step))
