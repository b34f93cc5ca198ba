"""Online reinforcement learning of a Kontext transformer, any task in any order of stages (UniPic 2.0's PDTR)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import counter_seed, draw
from data_pipeline.errors import InputError
from lightning_modules.evaluation.pictures import dashboard
from lightning_modules.folders import checkpoint_folder
from lightning_modules.gradients import GradientHooks, Gradients
from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.losses.forward_process import velocity_divergence
from lightning_modules.needs.images import image_needs
from lightning_modules.networks.adapters import Lora, add_lora, as_base
from lightning_modules.networks.autoencoder import decode_latents
from lightning_modules.networks.compile import compile_blocks
from lightning_modules.networks.compute import Compute, Precision, attend_in_float32, own_precision, recompute_blocks
from lightning_modules.networks.footprint import Needs, Workload
from lightning_modules.networks.kontext_transformer import load_frozen
from lightning_modules.networks.loading import check_state
from lightning_modules.networks.snapshots import Snapshots
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import LatentEncoder
from lightning_modules.pipelines.opening import connected, open_folder, prompts_of, reads_pictures
from lightning_modules.planning import Run
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import Weighted, judge, of_task, score
from lightning_modules.rollouts import collect, shares
from lightning_modules.rollouts.advantages import Advantages, normalised_sum
from lightning_modules.rollouts.algorithms import Algorithm, Point, RatioBased, by_step
from lightning_modules.rollouts.arithmetic import resolve
from lightning_modules.rollouts.policy import Policy
from lightning_modules.rollouts.recording import Recording
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.rollouts.verdicts import averages, judged
from lightning_modules.samplers import path
from lightning_modules.samplers.timesteps import schedule
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)
PATIENCE = 50  # batches that teach nothing before a run is given up
COUNTS = ("evaluations", "pictures", "trained")


class ReinforceModule(GradientHooks, L.LightningModule):
    """Trains the transformer of a checkpoint folder on what its own pictures are worth.

    A batch is a set of prompts. Groups of pictures of each are sampled and scored; once enough of them teach something
    the policy is updated, and what was sampled is dropped, so that every update is on pictures of the policy as it is.
    A batch of a task that no reward judges is what `regularisation.anchor` holds the policy on.

    Args:
        pretrained: checkpoint folder in the diffusers layout, such as the export of an earlier run, a Metaquery model's
            too: its queries and connector stay as they are, and the transformer is trained.
        rewards: what pictures are worth, by name.
        algorithm: a class of lightning_modules.rollouts.algorithms, or of one's own.
        advantages: how rewards become advantages.
        sampling: how many pictures, and how they are sampled.
        regularisation: what holds the policy back.
        recording: where judged rollouts are saved, or replayed from in place of sampling.
        lora: adapters to train in place of all weights.
        optimizer: AdamW and its schedule.
        steps: updates of the whole run, for the schedule.
        seed: the seed of every draw.
        max_sequence_length: T5 tokens of a prompt; None takes the folder's length.
        compile: compile the transformer's blocks, for sampling and training alike.
        recompute: keep no activations of the blocks: less memory, for another forward pass in each backward pass.
        vlm: folder of a Metaquery model's vision-language model, where its own folder has none.
        train_connector: train a Metaquery model's connector too, behind hidden states that stay as they are.
        frozen: precision of the text encoders, or of the vision-language model.
    """

    def __init__(
        self,
        pretrained: str,
        rewards: dict[str, Weighted],
        algorithm: Algorithm,
        advantages: Advantages = Advantages(),  # noqa: B008
        sampling: Sampling = Sampling(),  # noqa: B008
        regularisation: Regularisation = Regularisation(),  # noqa: B008
        recording: Recording = Recording(),  # noqa: B008
        lora: Lora | None = None,
        optimizer: AdamW = AdamW(),  # noqa: B008
        steps: int = 1000,
        seed: int = 0,
        max_sequence_length: int | None = None,
        compile: bool = False,
        recompute: bool = False,
        vlm: str | None = None,
        train_connector: bool = False,
        frozen: Precision = "float32",
    ) -> None:
        super().__init__()
        if regularisation.latent_kl > 0 and not isinstance(algorithm, RatioBased):
            raise InputError(
                f"latent_kl compares stochastic steps, which {type(algorithm).__name__} has not; use velocity_kl"
            )
        if regularisation.reference is not None and train_connector:
            raise InputError("regularisation.reference: a connector's is what it was; leave it out")
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, and no frozen weights
        self.pretrained, self.steps, self.seed, self.compile_blocks = pretrained, steps, seed, compile
        self.rewards, self.algorithm, self.advantages, self.sampling = rewards, algorithm, advantages, sampling
        self.regularisation, self.lora, self.optimizer_settings = regularisation, lora, optimizer
        self.recording = recording
        self.max_sequence_length, self.compute = max_sequence_length, Compute(frozen=frozen, recompute=recompute)
        self.vlm, self.train_connector = vlm, train_connector
        self.arithmetic = resolve(sampling, algorithm, regularisation, lora is not None, recompute)
        self.transformer: Any = None
        self.waiting: list[Rollout] = []
        self.anchor: ImageBatch | None = None
        self.evaluations, self.pictures, self.trained, self.idle, self.batches = 0, 0, 0, 0, 0
        self.given, self.tightened = regularisation, 1.0
        self._pipeline: KontextPipeline | None = None

    def configure_model(self) -> None:
        """Loads the checkpoint folder; called again it does nothing."""
        if self.transformer is not None:
            return
        self._pipeline = open_folder(checkpoint_folder(self.pretrained), self.vlm, self.compute.frozen_dtype)
        if getattr(self._pipeline, "reference", None) == "vlm":
            raise InputError(
                f"the transformer of {self.pretrained} sees no picture to edit, and rewards are given what it sees; "
                "reinforce a model that was trained with reference both or transformer"
            )
        if self.max_sequence_length is not None:
            self._pipeline.limit_t5(self.max_sequence_length)
        self._encoder, self._prompts = LatentEncoder(self._pipeline.vae), prompts_of(self._pipeline)
        self._pipeline.vae.decoder.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        inner = self._pipeline.transformer
        self.transformer = connected(self._pipeline, self._prompts) if self.train_connector else inner
        self.transformer.requires_grad_(True).train()
        if self.lora is not None:
            add_lora(inner, self.lora, self.seed)
        recompute_blocks(inner, self.compute.recompute)
        frozen = {f"transformer.{n}": p for n, p in self.transformer.named_parameters() if not p.requires_grad}
        self.snapshots = Snapshots(dict(self.trainable_parameters()), frozen)
        for name in self.regularisation.snapshots:
            self.snapshots.take(name)
        if (reference := self.regularisation.reference) is not None:
            other = dict(load_frozen(checkpoint_folder(reference), self.transformer).named_parameters())
            self.snapshots.put("reference", {f"transformer.{n}": w for n, w in as_base(other, inner).items()})
        self.compile_blocks = self.compile_blocks and compile_blocks(inner)

    def on_fit_start(self) -> None:
        """Says what an update is made of, and embeds the prompts ahead where the data can name them."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = None if getattr(data, "batch_tokens", None) else getattr(data, "batch_size", None)
        self.arithmetic = replace(self.arithmetic, devices=self.trainer.world_size, prompts=prompts)
        if self.global_rank == 0:
            logger.info(self.arithmetic.table())
        self.recording.check(self.batches, self.global_rank, self.trainer.world_size)
        pipeline = self.pipeline()
        attend_in_float32(self.transformer, self.device)
        if hasattr(data, "sizes"):
            pipeline.require_sizes(data.size_multiple, data.sizes.values())
        self.snapshots.to(self.device)
        self.waiting = [rollout.to(self.device) for rollout in self.waiting]
        if hasattr(data, "prompts"):
            self._prompts.fill(data.prompts())

    def pipeline(self) -> KontextPipeline:
        """The inference pipeline on the live weights, on this module's device."""
        assert self._pipeline is not None, "configure_model has not run"
        return self._pipeline.to(self.device)

    def latent_encoder(self) -> LatentEncoder:
        """The frozen autoencoder, for the data's cache."""
        return LatentEncoder.from_pretrained(str(checkpoint_folder(self.pretrained)))

    def hold_tighter(self, factor: float) -> None:
        """Multiplies the weights of all that holds the policy to its reference."""
        self.tightened *= factor
        self.regularisation = self.given.tightened(self.tightened)

    def workload(self) -> Workload:
        """What a picture costs that is sampled and learned from, for plan."""
        cost, settings = self.arithmetic, self.sampling
        backward = cost.branches * cost.points
        passes = cost.to_sample + cost.to_train - backward * bool(self.compute.recompute)
        together = settings.micro_groups * settings.group_size * cost.branches
        copies = len(self.regularisation.snapshots)
        return Workload(float(passes), float(backward), together, copies, settings.groups * settings.group_size)

    def needs(self, run: Run) -> Needs:
        """What a run holds and does, for plan."""
        other = self.lora is not None and self.regularisation.reference is not None
        return image_needs(run, self, int(other))

    def sources(self) -> dict[str, str]:
        """Folders, and what they must be, for doctor."""
        reference = self.regularisation.reference
        return {self.pretrained: "image"} | ({} if reference is None else {reference: "image"})

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        if self.regularisation.anchor > 0 and not judge(self.rewards, batch.task):
            self.anchor = batch
            return
        found = self.replay(batch) if self.recording.replay_from else self.collect(batch)
        self.batches += 1
        self.idle = 0 if found else self.idle + 1
        if self.idle == PATIENCE:
            raise InputError(
                f"{PATIENCE} batches of prompts in a row taught nothing: in each group all pictures are worth the same "
                "or have no score. Look at reward/* and rollouts/* in TensorBoard; take easier or harder prompts, "
                "larger groups, or a reward that tells pictures apart"
            )
        self.waiting += found
        packed = self.packed()
        # All devices learn together, from equally many batches.
        count = int(self.trainer.strategy.reduce(torch.tensor(len(packed), device=self.device), reduce_op="min"))
        if count >= self.arithmetic.micro_batches:
            self.improve(packed[:count], batch)
            self.waiting = []

    @torch.no_grad()
    def collect(self, batch: ImageBatch) -> list[Rollout]:
        """Samples groups of each prompt, has them scored meanwhile, and keeps those that teach something."""
        size, rewards = self.sampling.micro_groups, of_task(self.rewards, batch.task)
        beside = all(each.beside for each in rewards.values())
        pending: list[tuple[Rollout, Future[dict[str, Tensor]]]] = []
        # A thread begins on the first GPU, and a reward may take "cuda" for this device's.
        here: Any = {}
        if self.device.type == "cuda":
            here = {"initializer": torch.cuda.set_device, "initargs": (self.device,)}
        with ThreadPoolExecutor(1, **here) as pool, self.snapshots.using(self.regularisation.sampler):
            for start in range(0, len(batch), size):
                part = batch.rows(start, start + size)
                rollout = self.sample(part)
                pictures = self.pictures_of(rollout.trajectory.x0)
                for name, value in dashboard(pictures, self.sampling.group_size).items():
                    self.log(f"pictures/{batch.task}_{name}", value, batch_size=1)
                scores = pool.submit(score, rewards, pictures, self.requests(part, rollout))
                if not beside:
                    wait([scores])
                pending.append((rollout, scores))
        scored = [(rollout, future.result()) for rollout, future in pending]
        found, figures = judged(scored, self.weights, self.advantages)
        for name, figure in figures.items():
            self.log(name, figure, prog_bar=name in ("rollouts/useful", f"reward/{batch.task}"), batch_size=1)
        if self.recording.save_to is not None:
            self.recording.write(found, self.batches, self.trainer.global_step, self.global_rank)
        return found

    def replay(self, batch: ImageBatch) -> list[Rollout]:
        """What a run that was recorded collected from a batch."""
        fits = batch.task, self.sampling, self.algorithm, self.weights
        return [each.to(self.device) for each in self.recording.replay(self.batches, self.global_rank, *fits)]

    @property
    def weights(self) -> dict[str, float]:
        """Each reward's weight."""
        return {name: each.weight for name, each in self.rewards.items()}

    def sample(self, batch: ImageBatch) -> Rollout:
        """One rollout of these prompts."""
        settings, pipeline = self.sampling, self._pipeline
        assert pipeline is not None
        sequence, pooled = self.conditions(batch.prompts, batch)
        references, negative = self.encode_references(batch), self.negative(batch)
        policy = Policy(self.transformer, sequence, pooled, references, settings.guidance_scale, negative)
        config = pipeline.scheduler.config
        sigmas = schedule(settings.num_inference_steps, config.shift, config.num_train_timesteps)
        factor = 1 if batch.encoded and batch.has_targets else pipeline.vae_scale_factor
        height, width = (side // factor for side in batch.target.shape[-2:])
        trajectory = collect.sample(
            policy,
            (self.transformer.config.in_channels, height, width),
            batch,
            settings.group_size,
            sigmas,
            self.algorithm.stochastic(),
            self.algorithm.window_at(self.draw_uniform("window")),
            self.seed,
            settings.solver,
        )
        self.evaluations += self.arithmetic.to_sample * len(trajectory.x0)
        self.pictures += len(trajectory.x0)
        metadata = batch.metadata or [{}] * len(batch)
        conditions = sequence, pooled, references, trajectory
        sampler = str(self.algorithm.stochastic() or "")
        return Rollout(batch.task, batch.keys, batch.prompts, metadata, *conditions, negative=negative, sampler=sampler)

    def conditions(self, prompts: list[str], batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Sequence and pooled embeddings of prompts beside the pictures of a batch."""
        return self._prompts(prompts, batch.pixels() if reads_pictures(self._pipeline) else None)

    def negative(self, batch: ImageBatch) -> tuple[Tensor, Tensor] | None:
        """Embeddings of the negative branch, where there is one."""
        if self.sampling.guidance_scale == 1:
            return None
        return self.conditions([self.sampling.negative_prompt] * len(batch), batch)

    def encode_references(self, batch: ImageBatch) -> Float[Tensor, "p r c h w"] | None:
        """Posterior samples of the pictures to edit, where the transformer sees them."""
        references = self._encoder.encode_batch(batch).references
        if references is None:
            return None
        if not isinstance(references, Tensor):
            raise InputError("the prompts of a batch must have equally many pictures to edit, of one size")
        each = enumerate(references.unbind(1))
        return torch.stack([self._encoder.sample(m, self.seed, f"reference {r}", batch) for r, m in each], dim=1)

    def pictures_of(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], decoded in the autoencoder's own precision, for rewards read them exactly."""
        with own_precision(self._encoder.vae):
            return (decode_latents(self._encoder.vae, latents) / 2 + 0.5).clamp(0, 1)

    def requests(self, batch: ImageBatch, rollout: Rollout) -> list[Request]:
        """What each picture of a rollout was made from; pictures to edit as the transformer saw them."""
        sources: list[tuple[Tensor, ...]] = [()] * len(batch)
        if rollout.references is not None:
            pixels = self.pictures_of(rollout.references.flatten(0, 1))
            sources = [tuple(one) for one in pixels.unflatten(0, rollout.references.shape[:2])]
        of_groups = map(Request, rollout.prompts, sources, rollout.metadata)
        return [request for request in of_groups for _ in range(self.sampling.group_size)]

    def packed(self) -> list[Rollout]:
        """What waits, in batches of the geometry it was sampled in; what does not fill one is left out."""
        size, found = self.sampling.micro_groups, []
        for kind in sorted({rollout.kind for rollout in self.waiting}):
            whole = Rollout.join([rollout for rollout in self.waiting if rollout.kind == kind])
            found += [whole.select(range(i, i + size)) for i in range(0, len(whole.keys) - size + 1, size)]
        return found

    def improve(self, rollouts: list[Rollout], batch: ImageBatch) -> None:
        """One update of the policy, from rollouts, and from targets where that is asked for."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        first = self.global_rank * len(rollouts)  # no two devices draw alike
        judged = zip(rollouts, self.advantages_of(rollouts), strict=True)
        logs = [
            entry for i, (one, worth) in enumerate(judged) for entry in self.learn(one, worth, first + i, len(rollouts))
        ]
        for name, weight, loss in self.on_targets(batch):
            self.manual_backward(weight * loss)
            self.log(f"train/{name}", loss.detach(), batch_size=1)
        self.log("train/grad_norm", self._gradients.norm(), batch_size=1)
        self._gradients.clip(self.regularisation.max_grad_norm)
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        for name, share in self.regularisation.snapshots.items():
            self.snapshots.approach(name, share)
        for name, value in averages(logs).items():
            self.log(f"train/{name}", value, batch_size=1)
        self.log("cost/evaluations", float(self.evaluations), batch_size=1)
        if self.pictures:  # a replay samples none
            self.log("cost/per_picture", self.evaluations / self.pictures, batch_size=1)
        self.log("cost/per_trained_picture", self.evaluations / self.trained, batch_size=1)

    def advantages_of(self, rollouts: list[Rollout]) -> list[Float[Tensor, " b"]]:
        """Advantages of each rollout's pictures; GDPO's scale is of all groups of its task, on all devices."""
        every: list[Tensor | None] = [None] * len(rollouts)
        if self.advantages.kind == "decoupled":
            floor = self.advantages.std_floor
            own = torch.cat([normalised_sum(one.rewards, self.weights, floor) for one in rollouts]).to(self.device)
            # Devices have equally many groups, but not of each task: a number for its name goes with each.
            named = [crc32(one.task.encode()) for one in rollouts]
            rows = torch.tensor(named, device=self.device).repeat_interleave(self.sampling.micro_groups)
            sums, tasks = self.all_gather(own).flatten(0, -2), self.all_gather(rows).flatten()
            every = [sums[tasks == task] for task in named]
        found = (self.advantages(one.rewards, self.weights, sums) for one, sums in zip(rollouts, every, strict=True))
        return [values.flatten().to(self.device) for values in found]

    def learn(
        self, rollout: Rollout, advantages: Float[Tensor, " b"], number: int, count: int
    ) -> Iterator[dict[str, Tensor]]:
        """Adds the gradients of one rollout of `count`; yields what to log of each point."""
        policy = Policy.of(self.transformer, rollout, self.sampling.guidance_scale)
        points = list(self.algorithm.points(rollout, partial(self.draw_points, number, len(rollout))))
        frozen = {name: self.under(name, policy, points) for name in self.regularisation.asked}
        for i, point in enumerate(points):
            v = policy(point.x, point.sigma)
            others = {name: velocities[i] for name, velocities in frozen.items()}
            losses, metrics = self.algorithm.loss(v, others.get("old", v.detach()), point, rollout, advantages)
            metrics |= by_step(metrics, point, rollout) | {"loss": losses.detach().mean()}
            for name, weight, divergence in self.regularisation.divergences(self.algorithm, v, others, point, rollout):
                losses = losses + weight * divergence
                metrics[name] = divergence.detach().mean()
            self.manual_backward(losses.mean() / (count * len(points)))
            yield metrics
        self.evaluations += self.arithmetic.to_train * len(rollout)
        self.trained += len(rollout)

    def on_targets(self, batch: ImageBatch) -> Iterator[tuple[str, float, Tensor]]:
        """Names, weights and values of the losses that are not of rollouts."""
        settings = self.regularisation
        if settings.supervised > 0:
            policy, x0, noise, sigma = self.noised(batch, "supervised")
            v = policy(path.interpolate(x0, noise, sigma), sigma)
            yield "supervised", settings.supervised, flow_matching(v, path.velocity(x0, noise), torch.ones_like(sigma))
            self.evaluations += self.arithmetic.to_supervise * len(batch)
        if settings.anchor > 0 and self.anchor is not None:
            texts = [self.sampling.negative_prompt if i % 2 else text for i, text in enumerate(self.anchor.prompts)]
            # A batch may serve several updates, each with noise of its own.
            purpose = f"anchor {self.trainer.global_step}"
            policy, x0, noise, sigma = self.noised(replace(self.anchor, prompts=texts), purpose)
            x = path.interpolate(x0, noise, sigma)
            with torch.no_grad(), self.snapshots.using("reference"):
                reference = policy(x, sigma)
            yield "anchor", settings.anchor, velocity_divergence(policy(x, sigma), reference).mean()
            self.evaluations += self.arithmetic.to_anchor * len(self.anchor)
        elif settings.anchor > 0 and self.trainer.global_step >= PATIENCE:
            raise InputError(
                f"regularisation.anchor holds the policy on batches that no reward judges, and in {PATIENCE} updates "
                "none came; give data.ratio a share of such a set, and each reward its tasks, or set it to 0"
            )

    @torch.no_grad()
    def noised(self, batch: ImageBatch, purpose: str) -> tuple[Policy, Tensor, Tensor, Tensor]:
        """The policy under the conditions of a batch; its targets, noise, and noise levels spread evenly."""
        if not batch.has_targets:
            raise InputError(
                f"regularisation.{purpose.split()[0]} learns from targets, and prompts have none; set it to 0"
            )
        batch = self._encoder.encode_batch(batch.to(self.device))
        sequence, pooled = self.conditions(batch.prompts, batch)
        policy = Policy(self.transformer, sequence, pooled, self.encode_references(batch))
        x0 = self._encoder.sample(batch.target, self.seed, "target", batch)
        counters = batch.epochs, batch.sample_ids
        noise = draw(torch.randn, tuple(x0.shape[1:]), self.seed, f"{purpose} noise", *counters).to(x0)
        return policy, x0, noise, draw(torch.rand, (), self.seed, f"{purpose} sigma", *counters).to(x0)

    @torch.no_grad()
    def under(self, name: str, policy: Policy, points: list[Point]) -> list[Tensor]:
        """Velocities at points under other weights."""
        with self.snapshots.using(name):
            return [policy(point.x, point.sigma) for point in points]

    def draw_uniform(self, purpose: str) -> float:
        """One number in [0, 1) of an update."""
        return self.draw_points(0, 1, purpose, 0, ()).item()

    def draw_points(self, rollout: int, count: int, purpose: str, number: int, shape: tuple[int, ...]) -> Tensor:
        """`count` draws, normal for "noise" and else uniform: a function of the update, the rollout and the number."""
        seed = counter_seed(self.seed, f"{purpose} {number}", self.trainer.global_step, rollout)
        sampler = torch.randn if purpose == "noise" else torch.rand
        return sampler((count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, rule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the policies that are not trained, what waits for an update, and the counts; drops frozen weights."""
        self.drop_frozen(checkpoint)
        own = {
            "waiting": [(each.facts(), each.to("cpu").tensors()) for each in self.waiting],
            "anchor": None if self.anchor is None else vars(self.anchor.to("cpu")),
            **{name: getattr(self, name) for name in (*COUNTS, "idle", "batches")},
        }
        checkpoint["reinforce"] = {
            "copies": self.snapshots.state(),
            "tightened": self.tightened,
            "devices": shares.gathered(own),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_state(Path(self.pretrained), dict(self.trainable_parameters()), checkpoint["state_dict"])
        saved, devices = checkpoint["reinforce"], checkpoint["reinforce"]["devices"]
        self.snapshots.load(saved["copies"])
        self.waiting = [Rollout.of(facts, tensors) for facts, tensors in shares.share(devices, "waiting")]
        anchor = shares.beside(devices, "anchor")
        self.anchor = None if anchor is None else ImageBatch(**anchor)
        self.idle, self.batches = (shares.beside(devices, name) for name in ("idle", "batches"))
        self.evaluations, self.pictures, self.trained = (shares.counted(devices, name) for name in COUNTS)
        if saved["tightened"] != 1:
            self.hold_tighter(saved["tightened"])
