"""AdamW with weight-decay groups, warm-up and cosine, from config alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.lr_scheduler import LambdaLR

from data_pipeline.errors import InputError


@dataclass
class AdamW:
    """Settings of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and of its schedule.

    `weight_decay` applies to matrices and kernels only, never to biases, norms and other vectors. `bits` 8 keeps the
    moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861, through torchao); bfloat16 weights then have no float32
    masters and are rounded at random.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0
    bits: Literal[32, 8] = 32

    def __post_init__(self) -> None:
        if self.bits == 8:
            if find_spec("torchao") is None:
                raise InputError("optimizer.bits 8 needs torchao: pip install 'unipic-lightning[quant]'")
            import torchao.optim  # noqa: F401  # a checkpoint of its states can be read from here on
        if not (0 < self.lr < math.inf and self.eps > 0 and all(0 <= beta < 1 for beta in self.betas)):
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


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on float32 copies of bfloat16 parameters, which are rounded from the copies after each step.

    A step below half a unit of bfloat16's last place would be lost in the parameter itself. The copies are made at the
    first step and kept in the state as "master", beside the float32 moments.
    """

    CHUNK = 1 << 26  # numbers of which float32 gradients are made at a time

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for chunk in chunks([p for p in group["params"] if p.grad is not None], self.CHUNK):
                self._step(group, chunk)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] or self._begin(p) for p in parameters]
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        functional_adamw(
            [state["master"] for state in states],
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_(parameters, [state["master"] for state in states])

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        master = parameter.detach().float()
        moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        self.state[parameter] = {"step": master.new_zeros(()), "master": master, **moments}
        return self.state[parameter]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class does, which would round the state to the parameters' precision."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, parameters, strict=True):
            if place in state_dict["state"]:
                saved = state_dict["state"][place]
                self.state[p] = {name: value.to(p.device, torch.float32, copy=True) for name, value in saved.items()}


def chunks(parameters: list[Tensor], limit: int) -> list[list[Tensor]]:
    """The parameters in order, in lists of at most `limit` numbers or of one."""
    found: list[list[Tensor]] = []
    room = 0
    for p in parameters:
        if not found or p.numel() > room:
            found.append([])
            room = limit
        found[-1].append(p)
        room -= p.numel()
    return found


def adamw(
    parameters: Iterable[tuple[str, Parameter]], settings: AdamW, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser over (name, parameter) pairs and its schedule, stepped once an optimiser step."""
    if total_steps < 1:
        raise InputError(f"steps is {total_steps}; expected those of the whole run, at least 1")
    groups = weight_decay_groups(parameters, settings.weight_decay)
    low = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    common = settings.lr, settings.betas, settings.eps
    optimizer: torch.optim.Optimizer
    if settings.bits == 8:
        from torchao.optim import AdamW8bit  # optional

        optimizer = AdamW8bit(groups, *common, bf16_stochastic_round=low)
    elif low:
        optimizer = MasterAdamW(groups, *common)
    else:
        optimizer = torch.optim.AdamW(groups, *common, fused=True)
    rule = partial(
        warmup_cosine,
        warmup_steps=settings.warmup_steps,
        total_steps=total_steps,
        final_ratio=settings.final_lr_ratio,
    )
    return optimizer, LambdaLR(optimizer, lambda step: rule(step))
