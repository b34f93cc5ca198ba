"""Queries to a frozen vision-language model as a transformer's conditions (UniPic 2.0's Metaquery, stages 1 and 3)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import draw
from data_pipeline.errors import InputError
from lightning_modules.folders import checkpoint_folder, vlm_folder
from lightning_modules.gradients import GradientHooks, Gradients, require_norm_clipping
from lightning_modules.kontext import Dropout, Timesteps, check_tasks
from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.needs.connector import connector_needs
from lightning_modules.networks import Conditioner
from lightning_modules.networks.adapters import Lora, add_lora
from lightning_modules.networks.compile import compile_blocks
from lightning_modules.networks.compute import Compute, attend_in_float32, cast_weights, float8_blocks, recompute_blocks
from lightning_modules.networks.flops import connector_flops, passes_flops, query_flops
from lightning_modules.networks.footprint import Needs
from lightning_modules.networks.light_head import keep_blocks
from lightning_modules.networks.loading import check_state, read_json
from lightning_modules.networks.vlm import Reading
from lightning_modules.pipelines import KontextPipeline, MetaqueryPipeline
from lightning_modules.pipelines.encoders import LatentEncoder
from lightning_modules.pipelines.metaquery import Querying, querying_of, require_conditioner, vlm_of
from lightning_modules.pipelines.prompts import PromptCache
from lightning_modules.pipelines.queries import QueryCache
from lightning_modules.planning import Run
from lightning_modules.samplers import path
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)
KEEP = "keep everything"  # the instruction of a reconstruction


@dataclass
class Connector:
    """The sizes of a new connector; the defaults are the release's.

    Attributes:
        num_queries: learnable queries, the length of the transformer's text sequence.
        width: of the encoder.
        inner: of its feed-forward layers.
        layers: how many.
        heads: of its attention.
        query_norm: 2-norm that queries start at, about; a small language model heeds them more at that of its own
            embeddings.
    """

    num_queries: int = 256
    width: int = 1536
    inner: int = 8960
    layers: int = 24
    heads: int = 24
    query_norm: float = 1.0

    def __post_init__(self) -> None:
        if min(self.num_queries, self.width, self.inner, self.heads) < 1 or self.layers < 0:
            raise InputError(f"connector: sizes are whole numbers of at least 1 (layers of 0), got {self}")
        if not self.query_norm > 0:
            raise InputError(f"connector: query_norm is above 0, got {self.query_norm:g}")

    def config(self, language_width: int, transformer: Mapping[str, Any], fused_layers: int) -> dict[str, Any]:
        """Arguments of a Conditioner between a language model so wide and a transformer of this config."""
        return {
            "connector_config": {
                "hidden_size": self.width,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
            },
            "num_queries": self.num_queries,
            "llm_hidden_size": language_width,
            "pooled_projection_dim": transformer["pooled_projection_dim"],
            "joint_attention_dim": transformer["joint_attention_dim"],
            "fused_layers": fused_layers,
        }


class ConnectorModule(GradientHooks, L.LightningModule):
    """Trains queries and connector, the transformer, or all of them; autoencoder and vision-language model are frozen.

    Args:
        pretrained: checkpoint folder of transformer, autoencoder and scheduler, such as an export of configs/edit.yaml.
        vlm: folder of a Qwen2.5-VL, or "pocket", which is built on first use; None takes that of `conditioner`, else
            that of `pretrained`.
        conditioner: a Metaquery folder, the conditioner of which is gone on with; None takes that of `pretrained` if it
            has one, and else makes a new one.
        connector: sizes of a new one.
        train: what the optimiser moves; the queries belong to the connector.
        reference: who sees the pictures to edit; None takes what the conditioner was trained with, both for a new one.
        reading: how the vision-language model is queried; None as above.
        steps: optimiser steps of the whole run, for the schedule.
        seed: the seed of every draw.
        optimizer: AdamW and its schedule.
        timesteps: the distribution of sigma.
        dropout: probabilities of dropping conditions; an edit without its instruction keeps its pictures.
        task_weights: loss weight of each task's samples.
        target: the velocity to learn: that of the data, or what the frozen transformer predicts from its own text
            encoders' embeddings, which is free of the noise that one picture of many carries.
        reconstruction: share of edits that learn to give back what they are shown, against a balance between picture
            and text that neglects one of them (MENTOR, arXiv 2507.09574).
        light_head: blocks of the transformer that are kept, so that the connector first learns beside a light head
            (Query-Kontext, arXiv 2509.26641); its conditioner then goes with the whole transformer.
        vlm_lora: adapters to train in the vision-language model. What it reads is then computed in every step, and what
            it understands changes.
        feature_cache: folder that keeps what the vision-language model read from run to run.
        compile: compile the transformer's blocks (falls back to eager, and says so, without a C++ compiler).
        compute: precision of transformer and connector, that of the vision-language model (`frozen`), and what of the
            transformer is computed again to save memory.
    """

    def __init__(
        self,
        pretrained: str,
        vlm: str | None = None,
        conditioner: str | None = None,
        connector: Connector = Connector(),  # noqa: B008
        train: list[Literal["connector", "transformer"]] = ["connector"],  # noqa: B006
        reference: Literal["both", "vlm", "transformer"] | None = None,
        reading: Reading | None = None,
        steps: int = 1000,
        seed: int = 0,
        optimizer: AdamW = AdamW(),  # noqa: B008
        timesteps: Timesteps = Timesteps(),  # noqa: B008
        dropout: Dropout = Dropout(),  # noqa: B008
        task_weights: dict[str, float] | None = None,
        target: Literal["data", "text"] = "data",
        reconstruction: float = 0.0,
        light_head: int | None = None,
        vlm_lora: Lora | None = None,
        feature_cache: str | None = None,
        compile: bool = False,
        compute: Compute = Compute(),  # noqa: B008
    ) -> None:
        super().__init__()
        check_tasks("task_weights", task_weights or {})
        if not train and vlm_lora is None:
            raise InputError("train is empty; name connector, transformer or both")
        if not 0 <= reconstruction <= 1:
            raise InputError(f"reconstruction is a share from 0 to 1, got {reconstruction:g}")
        if feature_cache is not None and vlm_lora is not None:
            raise InputError("feature_cache keeps what a frozen VLM read; leave it out, or vlm_lora")
        if target == "text" and (light_head is not None or "transformer" in train):
            raise InputError("target: text takes a whole, frozen transformer as the teacher; train the connector alone")
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.pretrained, self.vlm, self.conditioner_folder, self.connector = pretrained, vlm, conditioner, connector
        self.parts, self.reference, self.reading = list(train), reference, reading
        self.steps, self.seed, self.optimizer_settings = steps, seed, optimizer
        self.timesteps, self.dropout, self.task_weights = timesteps, dropout, task_weights or {}
        self.target = target
        self.reconstruction, self.light_head, self.vlm_lora = reconstruction, light_head, vlm_lora
        self.feature_cache, self.compile_blocks, self.compute = feature_cache, compile, compute
        self.evaluations = 0
        self.transformer: Any = None
        self.conditioner: Any = None
        self._prefix_tokens = 0.0
        self._texts: PromptCache | None = None  # embeddings of the transformer's own text encoders, for the target

    def prepare_data(self) -> None:
        """Builds pocket folders that are asked for and missing (rank 0)."""
        checkpoint_folder(self.pretrained)
        vlm_folder(self.vlm or "")

    def configure_model(self) -> None:
        """Loads or makes all parts; called again it does nothing."""
        if self.transformer is not None:
            return
        self._pipeline = self.assembled()
        self._encoder = LatentEncoder(self._pipeline.vae)
        self._queries = QueryCache(self._pipeline, root=self.feature_cache)
        self.transformer, self.conditioner = self._pipeline.transformer, self._pipeline.conditioner
        if self.target == "text":
            own = {"transformer": self.transformer, "vae": self._pipeline.vae}
            folder = checkpoint_folder(self.pretrained)
            self._texts = PromptCache(KontextPipeline.from_pretrained(folder, self.compute.frozen_dtype, **own))
        if self.light_head is not None:
            keep_blocks(self.transformer, self.light_head)
        self.transformer.requires_grad_("transformer" in self.parts).train()
        self.conditioner.requires_grad_("connector" in self.parts).train()
        if self.vlm_lora is not None:
            add_lora(self._pipeline.vlm.model, self.vlm_lora, self.seed)
            self.language_model = self._pipeline.vlm.model
        self.computing()
        self.compile_blocks = self.compile_blocks and compile_blocks(self.transformer)

    def computing(self) -> None:
        """Precision of what is trained and of the frozen transformer, and what is computed again."""
        for part in (self.transformer, self.conditioner):
            cast_weights(part, self.compute.weights_dtype)
        if self.compute.float8:
            float8_blocks(self.transformer)
        recompute_blocks(self.transformer, self.compute.recompute)

    def assembled(self) -> MetaqueryPipeline:
        """The parts of the folders that are named, and a new conditioner where none is."""
        folder = checkpoint_folder(self.pretrained)
        known = checkpoint_folder(self.conditioner_folder) if self.conditioner_folder else None
        if known is None and (folder / "conditioner").is_dir():
            known = folder
        if known is not None:
            require_conditioner(known)
        before = Querying() if known is None else querying_of(known)
        querying = Querying(self.reference or before.reference, self.reading or before.reading)
        vlm = vlm_folder(self.vlm) if self.vlm else vlm_of(known or folder, None)
        conditioner = self.new_conditioner(folder, vlm, querying) if known is None else None
        conditioner = conditioner or Conditioner.from_pretrained(known, subfolder="conditioner")
        return MetaqueryPipeline.assembled(folder, conditioner, vlm, querying, vlm_dtype=self.compute.frozen_dtype)

    def new_conditioner(self, folder: Path, vlm: Path, querying: Querying) -> Conditioner:
        """Drawn from the seed alone, for this transformer and this vision-language model."""
        transformer, language = read_json(folder / "transformer" / "config.json"), read_json(vlm / "config.json")
        width = language.get("text_config", language)["hidden_size"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            conditioner = Conditioner(**self.connector.config(width, transformer, len(querying.reading.layers)))
        conditioner.meta_queries.data *= self.connector.query_norm
        return conditioner

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        require_norm_clipping(self.trainer)
        pipeline = self.pipeline()
        for part in (self.transformer, self.conditioner):
            attend_in_float32(part, self.device)
        if hasattr(data, "sizes"):
            pipeline.require_sizes(data.size_multiple, data.sizes.values())
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """Moves the frozen parts to the device; validation alone has no other hook that does."""
        self.pipeline()
        if self._texts is not None:
            self._texts.pipeline.to(self.device)

    def on_train_start(self) -> None:
        """Compiles for the shapes of each task, so that the first steps need not."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.compile_blocks and hasattr(data, "first_batches"):
            for batch in data.first_batches():
                logger.info("compiling the blocks for %s", batch.task)
                parameters = [p for _, p in self.trainable_parameters()]
                with self.trainer.precision_plugin.train_step_context():
                    loss = self.flow_matching_loss(batch.to(self.device))
                torch.autograd.grad(loss, parameters, allow_unused=True)  # leaves no trace: every draw is counted

    def teardown(self, stage: str) -> None:
        """Writes what the feature cache has not written yet."""
        if self.transformer is not None:
            self._queries.commit()

    def pipeline(self) -> MetaqueryPipeline:
        """The inference pipeline on the live weights, frozen parts included, on this module's device."""
        return self._pipeline.to(self.device)

    def latent_encoder(self) -> LatentEncoder:
        """The frozen autoencoder, for the data's cache too; usable before the module is configured."""
        if self.transformer is None:
            self._encoder = LatentEncoder.from_pretrained(str(checkpoint_folder(self.pretrained)))
        return self._encoder

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        loss = self.flow_matching_loss(batch)
        self.evaluations += (self.passes + (self._texts is not None)) * len(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log(f"train/loss_{batch.task}", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        with torch.compiler.set_stance("force_eager"):
            loss = self.flow_matching_loss(batch)
        self.log(f"val/loss_{batch.task}", loss, batch_size=len(batch), sync_dist=True, add_dataloader_idx=False)

    def flow_matching_loss(self, batch: ImageBatch) -> Tensor:
        """Rectified flow: regress the velocity, given clean references and what the queries brought back."""
        batch = self.prepared(batch)
        x0, references = self.encode(batch)
        noise = self.draw(torch.randn, tuple(x0.shape[1:]), "noise", batch)
        sigma = self.timesteps.sigma(self.draw(torch.rand, (), "sigma", batch), batch.tasks)
        x = path.interpolate(x0, noise, sigma)
        v = self.velocity(x, sigma, references, *self.embed(batch))
        target = path.velocity(x0, noise) if self._texts is None else self.own_velocity(x, sigma, batch, self._texts)
        weight = sigma.new_tensor([self.task_weights.get(task, 1.0) for task in batch.tasks])
        return flow_matching(v, target, weight)

    def velocity(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        references: Any,
        sequence: Float[Tensor, "b n e"],
        pooled: Float[Tensor, "b p"],
    ) -> Float[Tensor, "b c h w"]:
        """The transformer's v under these conditions."""
        return self.transformer(
            hidden_states=x,
            ref_hidden_states=references,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def own_velocity(
        self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], batch: ImageBatch, texts: PromptCache
    ) -> Float[Tensor, "b c h w"]:
        """The transformer's v from its own text encoders, all references shown to it."""
        return self.velocity(x, sigma, self._encoder.references(batch, self.seed), *texts(batch.prompts))

    def draw(self, sampler: Any, shape: tuple[int, ...], purpose: str, batch: ImageBatch) -> Float[Tensor, "b ..."]:
        """One fp32 draw per sample, a function of (seed, purpose, epoch, sample id) alone."""
        return draw(sampler, shape, self.seed, purpose, batch.epochs, batch.sample_ids).to(self.device)

    @torch.no_grad()
    def prepared(self, batch: ImageBatch) -> ImageBatch:
        """Moments in place of pixels, and in training captions dropped and edits made reconstructions by chance."""
        if not batch.has_targets:
            raise InputError("prompts have no target to learn from; leave data.prompt_records to reinforcement")
        batch = self._encoder.encode_batch(batch)
        if not self.training:
            return batch
        batch = self.reconstructed(batch)
        return replace(batch, prompts=self.dropout.captions(batch, self.seed))

    def reconstructed(self, batch: ImageBatch) -> ImageBatch:
        """Some edits with their one reference as the target, and an instruction to keep it."""
        references = batch.references
        if not self.reconstruction or not isinstance(references, Tensor) or references.shape[1] != 1:
            return batch
        if references.shape[-2:] != batch.target.shape[-2:]:
            return batch
        counters = batch.epochs, batch.sample_ids
        taken = draw(torch.rand, (), self.seed, "reconstruction", *counters) < self.reconstruction
        target = torch.where(taken.to(self.device)[:, None, None, None], references[:, 0], batch.target)
        prompts = [KEEP if one else prompt for one, prompt in zip(taken.tolist(), batch.prompts, strict=True)]
        return replace(batch, target=target, prompts=prompts)

    @torch.no_grad()
    def encode(self, batch: ImageBatch) -> tuple[Float[Tensor, "b c h w"], Any]:
        """Posterior samples of the target, and of what references the transformer sees."""
        target = self._encoder.sample(batch.target, self.seed, "target", batch)
        hidden = self._pipeline.reference == "vlm"
        dropped = self.training and self.dropout.references(batch, self.seed)
        return target, None if hidden or dropped else self._encoder.references(batch, self.seed)

    def embed(self, batch: ImageBatch) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b p"]]:
        """What the queries bring back, with gradients where they lead to something that is trained."""
        if self.vlm_lora is not None:
            return self._pipeline.condition(self._pipeline.read(batch.prompts, batch.pixels()))
        prefixes = self._queries.prefixes(batch.prompts, batch.pixels())
        self._prefix_tokens = sum(each["cache"].shape[-2] for each in prefixes) / len(prefixes)
        with nullcontext() if "connector" in self.parts else torch.no_grad():
            return self._pipeline.condition(prefixes)

    @property
    def passes(self) -> int:
        """The transformer's passes in a step: forward, backward to its input, and to its weights if it is trained."""
        if "transformer" in self.parts:
            return 3
        return 1 + ("connector" in self.parts or self.vlm_lora is not None)

    def training_flops(self, batch: ImageBatch) -> float:
        """Model FLOPs of one training step on this batch, without frozen encoders and what they read once."""
        factor = 1 if batch.encoded else self._pipeline.vae_scale_factor
        config, queries, trained = self.transformer.config, self._pipeline.text_tokens, "connector" in self.parts
        tokens = batch.area(references=self._pipeline.reference != "vlm") / (factor * config.patch_size) ** 2
        each = passes_flops(config, tokens, queries, float(self.passes), float(self.passes == 2))
        if self._texts is not None:
            each += passes_flops(config, tokens, self._texts.pipeline.text_tokens, 1.0)
        each += (3 if trained else 1) * connector_flops(self.conditioner.config)
        each += (2 if trained else 1) * query_flops(self._pipeline.vlm.text, queries, self._prefix_tokens)
        return len(batch) * each

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        return connector_needs(run, self, teacher=self.target == "text")

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        named = {self.conditioner_folder: "conditioner", self.vlm: "vlm", self.pretrained: "pictures"}
        return {folder: kind for folder, kind in named.items() if folder is not None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops frozen weights."""
        self.drop_frozen(checkpoint)
        checkpoint["evaluations"] = self.evaluations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names every weight that does not fit before any is copied."""
        self.evaluations = checkpoint["evaluations"]
        check_state(Path(self.pretrained), dict(self.trainable_parameters()), checkpoint["state_dict"])

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, schedule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
