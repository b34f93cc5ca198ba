"""Success on held-out scenes as training goes on, which may end it."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.ema import averaged
from callbacks.sample_grid import inference
from callbacks.stage import stage
from data_pipeline.errors import InputError
from lightning_modules.evaluation.scenes import SceneBenchmark, evaluate

logger = logging.getLogger(__name__)


class Probe(Callback):
    """Evaluates the averaged weights every n optimizer steps and logs what it finds as probe/<metric>.

    Args:
        benchmark: scenes to evaluate on.
        every_n_steps: optimizer steps between two evaluations; the first is before training.
        stop_above: training ends once each of these metrics is at least so high.
        stop_below: training ends once one of these metrics has fallen so low: what other tasks must not lose.
        tighten_below: each time one of these metrics is below that, `hold_tighter` of the stage module is called, which
            for reinforcement multiplies the weights of all that holds it to its reference.
        tighten_by: the factor.
    """

    def __init__(
        self,
        benchmark: SceneBenchmark,
        every_n_steps: int = 500,
        stop_above: dict[str, float] | None = None,
        stop_below: dict[str, float] | None = None,
        tighten_below: dict[str, float] | None = None,
        tighten_by: float = 2.0,
    ) -> None:
        if every_n_steps < 1 or tighten_by <= 1:
            raise InputError(
                f"Probe got every_n_steps={every_n_steps}, tighten_by={tighten_by:g}; expected at least 1, and above 1"
            )
        self.tighten_below, self.tighten_by = tighten_below or {}, tighten_by
        self.benchmark, self.every_n_steps = benchmark, every_n_steps
        self.stop_above, self.stop_below = stop_above or {}, stop_below or {}
        self.metrics: dict[str, float] = {}
        self._step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tighten_below and not hasattr(stage(pl_module), "hold_tighter"):
            raise InputError(
                f"Probe: {type(stage(pl_module)).__name__} is held to no reference; use stop_below, not tighten_below"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is None:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._step:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        with averaged(trainer, pl_module), inference(trainer, pl_module):
            self.metrics = evaluate(stage(pl_module).pipeline(), self.benchmark)
        named = self.stop_above.keys() | self.stop_below.keys() | self.tighten_below.keys()
        unknown = sorted(named - self.metrics.keys())
        if unknown:
            raise InputError(f"Probe: there is no metric {', '.join(unknown)}; there are {', '.join(self.metrics)}")
        for trainer_logger in trainer.loggers:
            trainer_logger.log_metrics({f"probe/{n}": v for n, v in self.metrics.items()}, step=trainer.global_step)
        shown = ", ".join(f"{n} {v:.3f}" for n, v in self.metrics.items() if n.count("_") == 1 or "guidance" in n)
        logger.info("step %d: %s", trainer.global_step, shown)
        reached = self.stop_above and all(self.metrics[n] >= v for n, v in self.stop_above.items())
        fallen = [n for n, v in self.stop_below.items() if self.metrics[n] < v]
        if reached or fallen:
            logger.info("stopping: %s", f"{', '.join(fallen)} fell too low" if fallen else "the goal is reached")
            trainer.should_stop = True
        if low := [n for n, v in self.tighten_below.items() if self.metrics[n] < v]:
            logger.info("%s fell too low: held %g times as tightly to the reference", ", ".join(low), self.tighten_by)
            module: Any = stage(pl_module)
            module.hold_tighter(self.tighten_by)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]
