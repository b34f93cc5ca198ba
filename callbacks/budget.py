"""The end of a run by what it has computed, so that runs of different algorithms can be compared."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.stage import stage
from data_pipeline.errors import InputError

logger = logging.getLogger(__name__)


class Budget(Callback):
    """Ends training after the first batch by which all devices together have spent a number of evaluations.

    List it before Checkpoint, which saves the last step of a run that stops.

    Args:
        max_evaluations: forward passes of the transformer for one picture, as the stage module counts them.
    """

    def __init__(self, max_evaluations: int) -> None:
        if max_evaluations < 1:
            raise InputError(f"Budget got max_evaluations={max_evaluations}; expected at least 1")
        self.max_evaluations = max_evaluations

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "evaluations"):
            raise InputError(
                f"Budget needs a module that counts its evaluations, which {type(pl_module).__name__} does not; "
                "end the run by trainer.max_steps"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_spent(trainer, pl_module)  # a run that ended before its summary was written trains no further

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_spent(trainer, pl_module)

    def _stop_if_spent(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spent = stage(pl_module).evaluations * trainer.world_size
        if spent >= self.max_evaluations:
            logger.info("stopping: %d of %d evaluations are spent", spent, self.max_evaluations)
            trainer.should_stop = True
