"""What a reinforced policy draws as training goes on, without asking its rewards: where one is exploited, it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.atomic import replace_file
from callbacks.curves import draw_curves
from data_pipeline.errors import InputError

SHOWN = ("reward/", "pictures/", "rollouts/", "train/ratio", "train/clipped", "train/divergence", "train/grad_norm")


class Dashboard(Callback):
    """Draws rewards, figures of the pictures themselves, ratios and shares of groups, batch by batch, to
    <log_dir>/samples/dashboard.png and to TensorBoard. Ratios are drawn of each stochastic step beside their average; a
    step that an update did not take stays where it was.

    Args:
        every_n_steps: optimizer steps between two drawings; it is drawn at the end too.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        if every_n_steps < 1:
            raise InputError(f"Dashboard got every_n_steps={every_n_steps}; expected at least 1")
        self.every_n_steps = every_n_steps
        self.curves: dict[str, list[float]] = {}
        self._drawn_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(SHOWN):
                self.curves.setdefault(name, []).append(float(value))
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # asks rank 0, so every rank must ask
        if trainer.global_step == self._drawn_step or not trainer.is_global_zero or not self.curves:
            return
        self._drawn_step = trainer.global_step
        picture = draw_curves(dict(sorted(self.curves.items())))
        replace_file(folder / "dashboard.png", lambda file: picture.save(file, format="PNG"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("dashboard", np.asarray(picture), trainer.global_step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves, "drawn_step": self._drawn_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves, self._drawn_step = state_dict["curves"], state_dict["drawn_step"]
