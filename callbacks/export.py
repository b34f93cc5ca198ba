"""The trained model as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.atomic import replace_folder
from callbacks.ema import averaged
from callbacks.stage import sharded, stage


class Export(Callback):
    """Writes <log_dir>/export when training has ended: `pl_module.pipeline()` with the averaged weights, which are
    float32 whatever precision they were trained in. An earlier export is replaced only once the new one is complete.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # This hook and not on_train_end, because it also runs when a resumed run turns out to be finished.
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "export"
        parts = sharded(pl_module)  # then all ranks gather, and the first has room for the whole
        if not trainer.fast_dev_run and (trainer.is_global_zero or parts):  # type: ignore[attr-defined]
            with averaged(trainer, pl_module, full_precision=True):
                module = stage(pl_module)
                pipeline = module.gathered(trainer.is_global_zero) if parts else module.pipeline()
                if trainer.is_global_zero:
                    with replace_folder(folder) as partial:
                        pipeline.save_pretrained(partial, safe_serialization=True)
        trainer.strategy.barrier("export")
