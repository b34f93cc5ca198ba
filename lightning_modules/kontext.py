"""Text-to-image and edit flow matching of a Kontext transformer (Skywork UniPic 2.0, stage 2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import TASKS, ImageBatch
from data_pipeline.counters import draw
from data_pipeline.errors import InputError
from lightning_modules.folders import checkpoint_folder
from lightning_modules.gradients import GradientHooks, Gradients, require_norm_clipping
from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.needs.images import image_needs
from lightning_modules.networks import KontextTransformer
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compile import compile_blocks
from lightning_modules.networks.compute import Compute, attend_in_float32, cast_weights, float8_blocks, recompute_blocks
from lightning_modules.networks.flops import passes_flops
from lightning_modules.networks.footprint import Needs, Workload
from lightning_modules.networks.loading import check_state
from lightning_modules.networks.sharding import full_state, load_sharded
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import LatentEncoder
from lightning_modules.pipelines.kontext import FROZEN
from lightning_modules.pipelines.prompts import PromptCache
from lightning_modules.planning import Run
from lightning_modules.samplers import path, timesteps
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)


@dataclass
class Timesteps:
    """How sigma is drawn. "logit_normal": Esser et al. 2024 (arXiv 2403.03206), section 3.1; "uniform": u itself.

    `mean` is one for all tasks or by task: an edit's reference gives away all but what the instruction changes, so only
    high noise teaches to follow it. `shift` moves sigma towards noise as SD3's scheduler does (1 leaves it; equation 23
    of the same paper).
    """

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float | dict[str, float] = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_tasks("timesteps.mean", self.mean if isinstance(self.mean, dict) else {})
        if self.std <= 0 or self.shift <= 0:
            raise InputError(f"timesteps: std and shift must be above 0, got {self.std:g} and {self.shift:g}")

    def sigma(self, u: Float[Tensor, " b"], tasks: Sequence[str]) -> Float[Tensor, " b"]:
        """Noise levels in (0, 1) from uniform draws."""
        if self.distribution == "logit_normal":
            means = [self.mean.get(task, 0.0) if isinstance(self.mean, dict) else self.mean for task in tasks]
            u = timesteps.logit_normal(u, u.new_tensor(means), self.std)
        return timesteps.shift(u, self.shift)


@dataclass
class Dropout:
    """Probability of dropping a condition: captions of each task (replaced by ""), and all references of an edit."""

    caption: dict[str, float] = field(default_factory=lambda: {"text_to_image": 0.1, "edit": 0.0})
    reference: float = 0.0

    def __post_init__(self) -> None:
        check_tasks("dropout.caption", self.caption)
        if not all(0 <= p <= 1 for p in (*self.caption.values(), self.reference)):
            raise InputError(f"dropout must be probabilities from 0 to 1, got {self}")

    def captions(self, batch: ImageBatch, seed: int) -> list[str]:
        """The batch's captions, some of them "" by chance."""
        probability = torch.tensor([self.caption.get(task, 0.0) for task in batch.tasks])
        dropped = draw(torch.rand, (), seed, "caption dropout", batch.epochs, batch.sample_ids) < probability
        return ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]

    def references(self, batch: ImageBatch, seed: int) -> bool:
        """Whether this batch trains without its references: one draw for the batch keeps its shapes equal."""
        if not self.reference:
            return False
        return bool(draw(torch.rand, (), seed, "reference dropout", batch.epochs, batch.sample_ids)[0] < self.reference)


def check_tasks(name: str, by_task: Mapping[str, float]) -> None:
    """Refuses names that are no task: a misspelt one would be as if it were not there."""
    unknown = sorted(set(by_task) - set(TASKS))
    if unknown:
        raise InputError(f"{name} names {', '.join(unknown)}; the tasks are {', '.join(TASKS)}")


class KontextModule(GradientHooks, L.LightningModule):
    """Trains the transformer of a checkpoint folder; the autoencoder and the text encoders stay frozen, and are loaded
    where something is to be encoded that no cache has, or decoded.

    Args:
        pretrained: checkpoint folder in the diffusers layout, or "pocket", which is built on first use.
        steps: optimiser steps of the whole run, for the schedule.
        seed: the seed of every draw.
        optimizer: AdamW and its schedule.
        timesteps: the distribution of sigma.
        dropout: probabilities of dropping conditions.
        task_weights: loss weight of each task's samples.
        max_sequence_length: T5 tokens of a prompt, kept by the exported tokenizer; None takes the folder's length.
        text_cache: folder that keeps text embeddings from run to run, as `data.cache.folder` keeps latents.
        compile: compile the transformer's blocks (falls back to eager, and says so, without a C++ compiler).
        lora: adapters to train in place of all weights.
        compute: precision, and what is computed again to save memory.
    """

    def __init__(
        self,
        pretrained: str = "pocket",
        steps: int = 1000,
        seed: int = 0,
        optimizer: AdamW = AdamW(),  # noqa: B008
        timesteps: Timesteps = Timesteps(),  # noqa: B008
        dropout: Dropout = Dropout(),  # noqa: B008
        task_weights: dict[str, float] | None = None,
        max_sequence_length: int | None = None,
        text_cache: str | None = None,
        compile: bool = False,
        lora: Lora | None = None,
        compute: Compute = Compute(),  # noqa: B008
    ) -> None:
        super().__init__()
        check_tasks("task_weights", task_weights or {})
        self.strict_loading = False  # a checkpoint holds what is trained, and no constant or frozen weights
        self.lora, self.compute = lora, compute
        self.pretrained, self.steps, self.seed = pretrained, steps, seed
        self.optimizer_settings, self.timesteps, self.dropout = optimizer, timesteps, dropout
        self.task_weights, self.max_sequence_length = task_weights or {}, max_sequence_length
        self.text_cache, self.compile_blocks = text_cache, compile
        self.evaluations = 0
        self.transformer: Any = None
        self._pipeline: KontextPipeline | None = None
        self._encoder: LatentEncoder | None = None
        self._prompts: PromptCache | None = None

    def prepare_data(self) -> None:
        """Builds the pocket checkpoint folder if it is asked for and missing (rank 0)."""
        checkpoint_folder(self.pretrained)

    def configure_model(self) -> None:
        """Loads the checkpoint folder; called again it does nothing."""
        if self.transformer is not None:
            return
        folder, sharded = checkpoint_folder(self.pretrained), {}
        if self.device_mesh is not None:
            if self.lora is not None:
                raise InputError("lora: adapters are small; train them with strategy ddp, not sharded")
            mesh = self.device_mesh["data_parallel"]
            sharded = {"transformer": load_sharded(folder, mesh, self.compute, self.trainer.strategy.root_device)}
        dtype = self.compute.frozen_dtype
        self._pipeline = KontextPipeline.from_pretrained(folder, text_dtype=dtype, later=FROZEN, **sharded)
        if self.max_sequence_length is not None:
            self._pipeline.limit_t5(self.max_sequence_length)
        self._encoder = LatentEncoder.of(self._pipeline)
        self._prompts = PromptCache(self._pipeline, root=self.text_cache)
        self.transformer = self._pipeline.transformer
        self.transformer.requires_grad_(True).train()
        if self.lora is not None:
            add_lora(self.transformer, self.lora, self.seed)
        if not sharded:
            cast_weights(self.transformer, self.compute.weights_dtype)
        if self.compute.float8:
            float8_blocks(self.transformer)
        recompute_blocks(self.transformer, self.compute.recompute)
        self.compile_blocks = self.compile_blocks and compile_blocks(self.transformer)

    def on_fit_start(self) -> None:
        """Embeds the captions ahead where the data can name them, as many as fit in memory: steps look them up."""
        trainer: Any = self.trainer
        require_norm_clipping(trainer)
        assert self._prompts is not None and self._pipeline is not None
        self._pipeline.to(self.device)
        attend_in_float32(self.transformer, self.device)
        if hasattr(trainer.datamodule, "sizes"):
            self._pipeline.require_sizes(trainer.datamodule.size_multiple, trainer.datamodule.sizes.values())
        if hasattr(trainer.datamodule, "prompts"):
            logger.info("embedding the captions, once")
            self._prompts.fill(trainer.datamodule.prompts())

    def on_validation_start(self) -> None:
        """Moves the frozen parts to the device; validation alone has no other hook that does."""
        self.pipeline()

    def on_train_start(self) -> None:
        """Compiles for the shapes of each task, so that the first steps need not."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.compile_blocks and self.device_mesh is None and hasattr(data, "first_batches"):
            for batch in data.first_batches():
                logger.info("compiling the blocks for %s", batch.task)
                self.compile_for(batch)

    def teardown(self, stage: str) -> None:
        """Writes the text embeddings that the cache has not written yet."""
        if self._prompts is not None and self._prompts.store is not None:
            self._prompts.store.commit()

    def compile_for(self, batch: ImageBatch) -> None:
        """A forward and a backward pass that leave no trace: every draw is counted, and gradients are dropped."""
        parameters = [p for _, p in self.trainable_parameters()]
        precision = self.trainer.precision_plugin
        with precision.train_step_context():
            loss = self.flow_matching_loss(precision.convert_input(batch).to(self.device))
        torch.autograd.grad(loss, parameters)

    def pipeline(self) -> KontextPipeline:
        """The inference pipeline on the live weights, frozen parts included, on this module's device."""
        assert self._pipeline is not None, "configure_model has not run"
        return self._pipeline.to(self.device)

    def gathered(self, keep: bool) -> KontextPipeline | None:
        """The pipeline with whole weights on the CPU, of sharded ones: all ranks ask, those that `keep` get it."""
        pipeline, state = self.pipeline(), full_state(self.transformer, keep)
        if not keep:
            return None
        transformer = KontextTransformer.from_config(self.transformer.config)
        transformer.load_state_dict(state)
        return KontextPipeline(**{**pipeline.components, "transformer": transformer})

    def latent_encoder(self) -> LatentEncoder:
        """The frozen autoencoder, for the data's cache too; usable before the module is configured."""
        if self._encoder is None:
            self._encoder = LatentEncoder.from_pretrained(str(checkpoint_folder(self.pretrained)))
        return self._encoder

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        loss = self.flow_matching_loss(batch)
        self.evaluations += self.passes * len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log(f"train/loss_{batch.task}", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        with torch.compiler.set_stance("force_eager"):  # a few batches are not worth compiling another graph for
            loss = self.flow_matching_loss(batch)
        self.log(f"val/loss_{batch.task}", loss, batch_size=len(batch), sync_dist=True, add_dataloader_idx=False)

    def flow_matching_loss(self, batch: ImageBatch) -> Tensor:
        """Rectified flow with references: regress v = eps - x0 at x_sigma, given the clean references and the text."""
        x0, references = self.encode(batch)
        sequence, pooled = self.embed(batch)
        noise = self.draw(torch.randn, tuple(x0.shape[1:]), "noise", batch)
        sigma = self.draw_sigma(batch)
        v = self.transformer(
            hidden_states=path.interpolate(x0, noise, sigma),
            ref_hidden_states=references,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        weight = sigma.new_tensor([self.task_weights.get(task, 1.0) for task in batch.tasks])
        return flow_matching(v, path.velocity(x0, noise), weight)

    def draw(self, sampler: Any, shape: tuple[int, ...], purpose: str, batch: ImageBatch) -> Float[Tensor, "b ..."]:
        """One fp32 draw per sample, a function of (seed, purpose, epoch, sample id) alone."""
        return draw(sampler, shape, self.seed, purpose, batch.epochs, batch.sample_ids).to(self.device)

    def draw_sigma(self, batch: ImageBatch) -> Float[Tensor, " b"]:
        """Noise levels in (0, 1), fp32."""
        return self.timesteps.sigma(self.draw(torch.rand, (), "sigma", batch), batch.tasks)

    @torch.no_grad()
    def encode(self, batch: ImageBatch) -> tuple[Float[Tensor, "b c h w"], Any]:
        """Posterior samples of target and references (None, (B, C, h, w) for one each, or lists), as released."""
        assert self._encoder is not None
        if not batch.has_targets:
            raise InputError("prompts have no target to learn from; leave data.prompt_records to reinforcement")
        batch = self._encoder.encode_batch(batch)
        target = self._encoder.sample(batch.target, self.seed, "target", batch)
        dropped = self.training and self.dropout.references(batch, self.seed)
        return target, None if dropped else self._encoder.references(batch, self.seed)

    @torch.no_grad()
    def embed(self, batch: ImageBatch) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """Text embeddings, in training with captions dropped to "" by chance; a prompt seen before is looked up."""
        assert self._prompts is not None
        return self._prompts(self.dropout.captions(batch, self.seed) if self.training else batch.prompts)

    @property
    def passes(self) -> int:
        """What a sample costs in forward passes: one, and backward at twice its cost, of adapters alone at once."""
        return 3 if self.lora is None else 2

    def workload(self) -> Workload:
        """What a sample costs, for plan."""
        return Workload(float(self.passes))

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        caches = {"text encoders": self.text_cache is not None, "autoencoder": run.cached}
        return replace(image_needs(run, self), asked=tuple(name for name, kept in caches.items() if kept))

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        return {self.pretrained: "image"}

    def training_flops(self, batch: ImageBatch) -> float:
        """Model FLOPs of one training step on this batch, without the frozen encoders and what is computed again."""
        assert self._pipeline is not None
        factor = 1 if batch.encoded else self._pipeline.vae_scale_factor
        config, frozen = self.transformer.config, float(self.lora is not None)
        tokens = batch.area() / (factor * config.patch_size) ** 2
        return len(batch) * passes_flops(config, tokens, self._pipeline.text_tokens, float(self.passes), frozen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops what is constant: the positional table, and the weights that adapters are added to."""
        checkpoint["evaluations"] = self.evaluations
        self.drop_frozen(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names every weight that does not fit before any is copied."""
        self.evaluations = checkpoint.get("evaluations", 0)
        if "state_dict" in checkpoint:  # a strategy that shards has compared and copied them itself
            check_state(Path(self.pretrained), dict(self.trainable_parameters()), checkpoint["state_dict"])

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, schedule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
