"""When checkpoints are written and which are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
from lightning.pytorch import LightningModule, Trainer

from data_pipeline.errors import InputError


class Checkpoint(lightning.pytorch.callbacks.Checkpoint):
    """<log_dir>/checkpoints/step_00000500.ckpt every n optimizer steps and at the last one; the newest `keep` stay.

    Written right after an optimizer step, never between the micro-batches of one: the accumulated gradients are in no
    checkpoint. The last step is saved before the epoch is closed, so that a finished run can be resumed to a larger
    `max_steps` exactly. There is no `last.ckpt` beside: the file with the highest step is the last.

    Built on Lightning's base class: its ModelCheckpoint forgets on resuming that the step is saved already (and then
    saves in the middle of an accumulation), and keeps the newest k only as the best k of a metric.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise InputError(f"Checkpoint got every_n_steps={every_n_steps} and keep={keep}; both must be at least 1.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.last_model_path = ""
        self._folder = Path()
        self._saved_step = 0

    @property
    def best_model_path(self) -> str:
        """What Lightning loads for `ckpt_path="best"`."""
        return self.last_model_path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.global_step == trainer.max_steps or trainer.should_stop
        if last or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._folder / f"step_{step:08d}.ckpt"
        self.last_model_path = str(path)
        trainer.save_checkpoint(path)
        self._saved_step = step
        if trainer.is_global_zero:
            older = [p for p in checkpoints(self._folder) if step_of(p) < step]
            for path in older[: max(0, len(older) - self.keep + 1)]:
                trainer.strategy.remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        return {"last_model_path": self.last_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_model_path = state_dict["last_model_path"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    return sorted((p for p in folder.glob("step_*.ckpt") if step_of(p) >= 0), key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 if there is none.

    >>> step_of(Path("step_00000500.ckpt"))
    500
    """
    match = re.fullmatch(r"step_(\d+)\.ckpt", path.name)
    return int(match.group(1)) if match else -1
