"""The trained model as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from callbacks.atomic import replace_folder
from callbacks.ema import averaged
from callbacks.stage import stage
from data_pipeline.errors import InputError


class Export(Callback):
    """Writes <log_dir>/export when training has ended: `pl_module.pipeline()` with the averaged weights, which are
    float32 whatever precision they were trained in. An earlier export is replaced only once the new one is complete.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(isinstance(p, DTensor) for _, p in stage(pl_module).trainable_parameters()):
            raise InputError(
                "Export got sharded parameters, which it cannot write. Train with the ddp strategy, or leave the "
                "Export callback out of the configuration and export the checkpoint on one device."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # This hook and not on_train_end, because it also runs when a resumed run turns out to be finished.
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "export"
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with averaged(trainer, pl_module, full_precision=True), replace_folder(folder) as partial:
                stage(pl_module).pipeline().save_pretrained(partial, safe_serialization=True)
        trainer.strategy.barrier("export")
