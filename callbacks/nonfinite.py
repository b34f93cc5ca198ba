"""Stops before a non-finite loss or gradient reaches the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from callbacks.stage import stage
from data_pipeline.errors import InputError


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is NaN or infinite; weights and optimizer state are as before the step."""


@dataclass(frozen=True)
class MicroBatch:
    """What it takes to find a micro-batch again; `sample_ids` stays on its device until it is printed."""

    task: str
    keys: list[str]
    sample_ids: Tensor | None
    loss: Tensor | None = None

    def __str__(self) -> str:
        ids = self.keys if self.sample_ids is None else self.sample_ids.tolist()
        named = ", ".join(f"{key} ({i})" for key, i in zip(self.keys, ids, strict=True))
        return f"loss {float('nan') if self.loss is None else self.loss.item():.6g} of {self.task} {named}"


class NonFiniteGuard(Callback):
    """Checks the loss of every micro-batch and the norm of all gradients, with one synchronisation per optimizer step,
    and raises NonFiniteError with the step, the loss, the first five parameters and the samples of the step.

    With float16 and a gradient scaler, which skips overflowing steps itself, only the loss is checked.
    """

    def __init__(self, on_nonfinite: Literal["stop"] = "stop") -> None:
        if on_nonfinite != "stop":
            raise InputError(f"on_nonfinite is {on_nonfinite!r}; the only choice is 'stop'.")
        self.on_nonfinite = on_nonfinite
        self._current = MicroBatch("batch", [], None)
        self._seen: list[MicroBatch] = []
        self._stepped = False
        self._parameters: dict[str, Parameter] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = []
        self._parameters = dict(stage(pl_module).trainable_parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._stepped:
            self._seen, self._stepped = [], False
        keys = list(getattr(batch, "keys", []))
        self._current = MicroBatch(getattr(batch, "task", "batch"), keys, getattr(batch, "sample_ids", None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Lightning has divided the loss by the number of micro-batches by now.
        loss = loss.detach() * trainer.accumulate_grad_batches
        self._seen.append(replace(self._current, loss=loss))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses = [b.loss for b in self._seen if b.loss is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = {} if scaled else {n: _local(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        norm = [stage(pl_module).gradient_norm()] if gradients else []
        # A finite norm is proof. One that is not may be the overflow of finite gradients beyond 1e19.
        bad = not all_finite([*losses, *norm]) and not all_finite([*losses, *gradients.values()])
        if trainer.world_size > 1:
            # All ranks must stop together: one alone would leave the others waiting for it.
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise NonFiniteError(_message(trainer.global_step, gradients, self._seen, trainer.world_size))
        self._stepped = True


def _message(step: int, gradients: dict[str, Tensor], seen: list[MicroBatch], ranks: int) -> str:
    names = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"Non-finite values after {step} optimizer steps; stopped before the next one, so the weights and the "
        "optimizer state are unchanged.\n"
        f"  gradients that are not finite: {shown or 'none on this rank'}\n"
        + "".join(f"  {batch}\n" for batch in seen)
        + ("The losses are those of this rank; the other ranks name theirs.\n" if ranks > 1 else "")
        + "Look at these samples with `python -m data_pipeline inspect`; if they are fine, lower the learning rate or "
        "clip the gradients, and resume from the last checkpoint."
    )


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is NaN or infinite, with one synchronisation."""
    found = [torch.isfinite(tensor).all() for tensor in tensors]
    return not found or bool(torch.stack([flag.to(found[0].device) for flag in found]).all())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
