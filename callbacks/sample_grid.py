"""Pictures of what the model makes of fixed held-out samples as training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.atomic import replace_file
from callbacks.ema import averaged
from callbacks.grid import GridRow, draw_grid
from callbacks.stage import sharded, stage
from data_pipeline.batches import ImageBatch
from data_pipeline.counters import generator
from data_pipeline.errors import InputError


class SampleGrid(Callback):
    """Draws rows source | target | output with the averaged weights before the first optimizer step, every n steps and
    at the end, to <log_dir>/samples/step_000000.png and to TensorBoard.

    The samples are `trainer.datamodule.sample_batches(num_samples) -> list[ImageBatch]`, one batch of pixels per task.
    Each keeps its noise from step to step, drawn by counter, so that only the weights differ between two grids, and
    training does not notice: no global generator is used and nothing is compiled anew.
    """

    def __init__(
        self,
        every_n_steps: int,
        num_samples: int = 8,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        negative_prompt: str | None = None,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or num_samples < 1:
            raise InputError(
                f"SampleGrid got every_n_steps={every_n_steps} and num_samples={num_samples}; both must be at least 1."
            )
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.seed = seed
        self._drawn_step: int | None = None
        self._batches: list[ImageBatch] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_step, self._batches = None, []
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "sample_batches"):
            raise InputError(
                f"SampleGrid needs a datamodule with sample_batches(num_samples), got {type(datamodule).__name__}. "
                "Use the project's datamodule, or leave the SampleGrid callback out of the configuration."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._draw(trainer, pl_module)
        else:
            self._drawn_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With accumulation several batches end at the same step, which is drawn once; before the first step ends,
        # the step is 0 and drawn already.
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._drawn_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._drawn_step = step
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        if not trainer.is_global_zero and not sharded(pl_module):
            return
        if not self._batches:
            self._batches = trainer.datamodule.sample_batches(self.num_samples)  # type: ignore[attr-defined]
        if not self._batches:
            rank_zero_warn("SampleGrid draws nothing: the data has no held-out samples (split val).")
            return
        with averaged(trainer, pl_module), inference(trainer, pl_module):
            grid = draw_grid([self._rows(pl_module, batch) for batch in self._batches])
        if not trainer.is_global_zero:
            return
        replace_file(folder / f"step_{step:06d}.png", lambda file: grid.save(file, format="PNG"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def _rows(self, pl_module: LightningModule, batch: ImageBatch) -> list[GridRow]:
        pipeline = stage(pl_module).pipeline()
        pipeline.set_progress_bar_config(disable=True)
        references = reference_images(batch.references, len(batch))
        outputs = pipeline(
            prompt=list(batch.prompts),
            image=references if any(references) else None,
            height=batch.target.shape[-2],
            width=batch.target.shape[-1],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            generator=generator(self.seed, f"sample_grid {batch.task}", 0, 0),
            output_type="pil",
        ).images
        blank = torch.ones(len(batch), 3, *batch.target.shape[-2:])
        targets = batch.target if batch.has_targets else blank
        rows = zip(batch.prompts, references, targets, outputs, strict=True)
        return [GridRow(prompt, sources, to_pil(target), output) for prompt, sources, target, output in rows]


@contextmanager
def inference(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, the trainer's precision, uncompiled; every module's mode is put back after."""
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.val_step_context(),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def reference_images(
    references: Float[Tensor, "B R 3 h w"] | list[list[Float[Tensor, "3 _ _"]]] | None, count: int
) -> list[list[PIL.Image.Image]]:
    """Each sample's references as pictures; `count` empty lists for None."""
    if references is None:
        return [[] for _ in range(count)]
    return [[to_pil(image) for image in images] for images in references]


def to_pil(pixels: Float[Tensor, "3 h w"]) -> PIL.Image.Image:
    """From [-1, 1] to 8 bits."""
    levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(levels.permute(1, 2, 0).numpy())
