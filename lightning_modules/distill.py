"""Distillation of velocities: guidance into a model that needs none, or one expert a task into one model.

Guidance: Meng et al. 2023 (arXiv 2210.03142), for one scale. Experts, on the student's own states: Diffusion OPD of
verl-omni, whose divergence of two steps of equal noise, |mu - mu_T|^2 / (2 s^2), is one of velocities but for a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import counter_seed, draw
from data_pipeline.errors import InputError
from lightning_modules.folders import checkpoint_folder
from lightning_modules.gradients import GradientHooks, Gradients
from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.needs.images import image_needs
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compile import compile_blocks
from lightning_modules.networks.compute import (
    Compute,
    Precision,
    attend_in_float32,
    cast_weights,
    recompute_blocks,
)
from lightning_modules.networks.footprint import Needs, Workload
from lightning_modules.networks.kontext_transformer import load_frozen
from lightning_modules.networks.loading import check_state
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import LatentEncoder
from lightning_modules.pipelines.prompts import PromptCache
from lightning_modules.planning import Run
from lightning_modules.rollouts.policy import Policy
from lightning_modules.samplers import ode, path, timesteps
from lightning_modules.schedule import AdamW, adamw


@dataclass
class Teacher:
    """Whom the student learns one task from.

    Attributes:
        folder: checkpoint folder, with the student's autoencoder and text encoders.
        guidance_scale: of classifier-free guidance; other than 1 it costs a second forward pass.
        negative_prompt: the text of its negative branch.
    """

    folder: str
    guidance_scale: float = 1.0
    negative_prompt: str = ""


@dataclass
class States:
    """Where the student is compared with its teacher.

    Attributes:
        source: "data": noisy latents of the data's targets; "student": what it comes by itself from noise, so that it
            learns where its own mistakes lead it (more costly, and no target is read).
        num_inference_steps: Euler steps of the student's way, one of which is drawn for each batch.
        shift: moves noise levels of "data" towards noise, as SD3's scheduler does.
    """

    source: Literal["data", "student"] = "data"
    num_inference_steps: int = 10
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or self.shift <= 0:
            raise InputError(f"states: num_inference_steps is at least 1, and shift above 0; got {self}")


class DistillModule(GradientHooks, L.LightningModule):
    """Trains the transformer of a checkpoint folder to have its teachers' velocities, without any guidance of its own.

    Args:
        pretrained: checkpoint folder that the student starts from.
        teachers: by task, "text_to_image" and "edit".
        states: where they are compared.
        lora: adapters to train in place of all weights.
        optimizer: AdamW and its schedule.
        steps: optimiser steps of the whole run, for the schedule.
        seed: the seed of every draw.
        max_sequence_length: T5 tokens of a prompt; None takes the folder's length.
        compile: compile the blocks of all transformers.
        recompute: keep no activations of the student's blocks: less memory, for another forward pass in each backward
            pass.
        frozen: precision of the text encoders and of the teachers.
    """

    def __init__(
        self,
        pretrained: str,
        teachers: dict[str, Teacher],
        states: States = States(),  # noqa: B008
        lora: Lora | None = None,
        optimizer: AdamW = AdamW(),  # noqa: B008
        steps: int = 1000,
        seed: int = 0,
        max_sequence_length: int | None = None,
        compile: bool = False,
        recompute: bool = False,
        frozen: Precision = "float32",
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.pretrained, self.teachers, self.states, self.optimizer_settings = pretrained, teachers, states, optimizer
        self.steps, self.seed, self.max_sequence_length = steps, seed, max_sequence_length
        self.compile_blocks, self.lora = compile, lora
        self.compute = Compute(frozen=frozen, recompute=recompute)
        self.evaluations = 0
        self.transformer: Any = None
        self._frozen: dict[str, Any] = {}  # teachers' transformers by folder, in no checkpoint

    def configure_model(self) -> None:
        """Loads all checkpoint folders; called again it does nothing."""
        if self.transformer is not None:
            return
        folder, frozen = checkpoint_folder(self.pretrained), self.compute.frozen_dtype
        self._pipeline = KontextPipeline.from_pretrained(folder, text_dtype=frozen)
        if self.max_sequence_length is not None:
            self._pipeline.limit_t5(self.max_sequence_length)
        self._encoder, self._prompts = LatentEncoder(self._pipeline.vae), PromptCache(self._pipeline)
        self.transformer = self._pipeline.transformer
        self.transformer.requires_grad_(True).train()
        if self.lora is not None:
            add_lora(self.transformer, self.lora, self.seed)
        recompute_blocks(self.transformer, self.compute.recompute)
        for name in {teacher.folder for teacher in self.teachers.values()}:
            self._frozen[name] = load_frozen(checkpoint_folder(name), self.transformer)
            cast_weights(self._frozen[name], frozen)
        if self.compile_blocks:
            self.compile_blocks = all([compile_blocks(each) for each in (self.transformer, *self._frozen.values())])

    @property
    def passes(self) -> int:
        """What the student's step costs in forward passes: one, and backward at twice its cost, of adapters at once."""
        return 3 if self.lora is None else 2

    def workload(self) -> Workload:
        """What a sample costs at the most, for plan: the student's way there, its step, and a guided teacher."""
        way = (self.states.num_inference_steps - 1) / 2 if self.states.source == "student" else 0.0
        teacher = max(1 + (teacher.guidance_scale != 1) for teacher in self.teachers.values())
        return Workload(way + self.passes + teacher)

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        return image_needs(
            run, self, others=len({teacher.folder for teacher in self.teachers.values()}), precision=self.compute.frozen
        )

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        return {self.pretrained: "image", **{teacher.folder: "transformer" for teacher in self.teachers.values()}}

    def on_fit_start(self) -> None:
        """Embeds the prompts ahead where the data can name them."""
        self.pipeline()
        for teacher in self._frozen.values():
            teacher.to(self.device)
        for transformer in (self.transformer, *self._frozen.values()):
            attend_in_float32(transformer, self.device)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "prompts"):
            self._prompts.fill(data.prompts())

    def pipeline(self) -> KontextPipeline:
        """The inference pipeline on the live weights, on this module's device."""
        return self._pipeline.to(self.device)

    def latent_encoder(self) -> LatentEncoder:
        """The frozen autoencoder, for the data's cache."""
        return LatentEncoder.from_pretrained(str(checkpoint_folder(self.pretrained)))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        batch = self._encoder.encode_batch(batch)
        student = self.student(batch)
        x, sigma = self.own_states(student, batch) if self.states.source == "student" else self.data_states(batch)
        loss = flow_matching(student(x, sigma), self.target(student, x, sigma, batch), torch.ones_like(sigma))
        self.evaluations += (self.passes + bool(self.compute.recompute)) * len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log(f"train/loss_{batch.task}", loss, batch_size=len(batch))
        return loss

    @torch.no_grad()
    def student(self, batch: ImageBatch) -> Policy:
        """The student under a batch's conditions."""
        sequence, pooled = self._prompts(batch.prompts)
        if batch.references is None:
            return Policy(self.transformer, sequence, pooled, None)
        if not isinstance(batch.references, Tensor):
            raise InputError("the samples of a batch must have equally many pictures to edit, of one size")
        moments = batch.references.unbind(1)
        samples = [self._encoder.sample(each, self.seed, f"reference {r}", batch) for r, each in enumerate(moments)]
        return Policy(self.transformer, sequence, pooled, torch.stack(samples, dim=1))

    @torch.no_grad()
    def target(
        self, student: Policy, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], batch: ImageBatch
    ) -> Float[Tensor, "b c h w"]:
        """The velocity of the task's teacher under the student's conditions."""
        if batch.task not in self.teachers:
            raise InputError(f"there is no teacher of the task {batch.task!r}; there are {', '.join(self.teachers)}")
        teacher = self.teachers[batch.task]
        guided = teacher.guidance_scale != 1
        negative = self._prompts([teacher.negative_prompt]) if guided else None
        conditions = student.sequence, student.pooled, student.references, teacher.guidance_scale, negative
        self.evaluations += len(batch) * (2 if guided else 1)
        return Policy(self._frozen[teacher.folder], *conditions)(x, sigma)

    @torch.no_grad()
    def data_states(self, batch: ImageBatch) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """Noisy latents of the targets."""
        if not batch.has_targets:
            raise InputError('these prompts have no targets, of which states of "data" are made; use source: student')
        x0 = self._encoder.sample(batch.target, self.seed, "target", batch)
        noise = self.draw(torch.randn, tuple(x0.shape[1:]), "noise", batch)
        sigma = timesteps.shift(self.draw(torch.rand, (), "sigma", batch), self.states.shift)
        return path.interpolate(x0, noise, sigma), sigma

    @torch.no_grad()
    def own_states(self, student: Policy, batch: ImageBatch) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """What the student comes to from noise, at one step of its sampler."""
        steps, config = self.states.num_inference_steps, self._pipeline.scheduler.config
        sigmas = timesteps.schedule(steps, config.shift, config.num_train_timesteps)
        counters = int(batch.epochs[0]), int(batch.sample_ids[0])
        taken = counter_seed(self.seed, "state", *counters) % steps
        factor = 1 if batch.has_targets else self._pipeline.vae_scale_factor  # prompts say pixels
        height, width = (side // factor for side in batch.target.shape[2:])
        x = self.draw(torch.randn, (self.transformer.config.in_channels, height, width), "start", batch)
        if taken:
            self.evaluations += taken * len(batch)
            x = ode.euler(student, x, sigmas[: taken + 1])
        return x, sigmas[taken].expand(len(batch)).to(self.device)

    def draw(self, sampler: Any, shape: tuple[int, ...], purpose: str, batch: ImageBatch) -> Float[Tensor, "b ..."]:
        """One draw a sample, a function of (seed, purpose, epoch, sample id) alone."""
        return draw(sampler, shape, self.seed, purpose, batch.epochs, batch.sample_ids).to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops what is constant: the positional table, and the weights that adapters are added to."""
        self.drop_frozen(checkpoint)
        checkpoint["evaluations"] = self.evaluations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names every weight that does not fit before any is copied."""
        check_state(Path(self.pretrained), dict(self.trainable_parameters()), checkpoint["state_dict"])
        self.evaluations = checkpoint["evaluations"]

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, rule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}
