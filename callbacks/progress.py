"""The progress of a run on a terminal and in a log file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """A bar with the values logged with `prog_bar=True` (loss, samples/s); where standard output is no terminal,
    one plain line every n optimizer steps instead, free of control codes.

    Args:
        every_n_steps: optimizer steps between plain lines.
        plain: lines (True) or a bar (False) instead of looking at standard output.
    """

    def __init__(self, every_n_steps: int = 50, plain: bool | None = None, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.every_n_steps = every_n_steps
        self.plain = not sys.stdout.isatty() if plain is None else plain
        self._start_time = 0.0
        self._step = 0

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and not self.plain

    @property
    def total_train_batches(self) -> int | float:
        """Of the epoch; of the run where the epoch is endless but the optimizer steps are not."""
        batches = super().total_train_batches
        if batches == float("inf") and self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_time = time.monotonic()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        due = self._step % self.every_n_steps == 0 or self._step == trainer.max_steps
        # `_enabled` is off on all ranks but the first.
        if self.plain and self._enabled and due:
            metrics = self.get_metrics(trainer, pl_module)
            print(self._line(trainer.max_steps, metrics), flush=True)

    def _line(self, max_steps: int, metrics: dict[str, Any]) -> str:
        total = f"/{max_steps}" if max_steps > 0 else ""
        elapsed = timedelta(seconds=int(time.monotonic() - self._start_time))
        values = [f"{name} {_short(value)}" for name, value in metrics.items()]
        return "  ".join([f"step {self._step}{total}", *values, str(elapsed)])


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
