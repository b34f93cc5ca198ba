"""Online reinforcement learning of a Kontext transformer, any task in any order of stages (UniPic 2.0's PDTR)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from data_pipeline.batches import ImageBatch
from data_pipeline.counters import counter_seed, draw
from data_pipeline.errors import InputError
from lightning_modules.gradients import Gradients
from lightning_modules.losses.forward_process import velocity_divergence
from lightning_modules.networks.autoencoder import decode_latents, sample_latents
from lightning_modules.networks.compile import compile_blocks
from lightning_modules.networks.snapshots import Snapshots
from lightning_modules.pipelines import KontextPipeline
from lightning_modules.pipelines.encoders import LatentEncoder
from lightning_modules.pipelines.prompts import PromptCache
from lightning_modules.pocket import checkpoint_folder
from lightning_modules.rewards.protocol import Request, Reward
from lightning_modules.rollouts import collect
from lightning_modules.rollouts.advantages import Advantages, weighted_sum
from lightning_modules.rollouts.algorithms import GRPO, Algorithm, Point
from lightning_modules.rollouts.records import Rollout
from lightning_modules.samplers.guidance import guide
from lightning_modules.samplers.ode import Velocity
from lightning_modules.samplers.timesteps import schedule
from lightning_modules.schedule import AdamW, adamw

logger = logging.getLogger(__name__)


@dataclass
class Sampling:
    """How pictures are sampled to learn from.

    Attributes:
        group_size: pictures of each prompt, G.
        groups: groups that an update learns from, at least; prompts are sampled until so many are worth it.
        micro_groups: groups that are sampled, and later trained on, in one batch.
        num_inference_steps: steps of the sampler.
        guidance_scale: of classifier-free guidance, in sampling and in training; 1 needs half the evaluations.
        negative_prompt: the text of its negative branch.
    """

    group_size: int = 12
    groups: int = 8
    micro_groups: int = 4
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.group_size < 2 or min(self.groups, self.micro_groups, self.num_inference_steps) < 1:
            raise InputError(f"sampling: a group has at least 2 pictures, all else is at least 1; got {self}")
        if self.groups % self.micro_groups:
            raise InputError(f"sampling: groups {self.groups} must be a multiple of micro_groups {self.micro_groups}")


class ReinforceModule(L.LightningModule):
    """Trains the transformer of a checkpoint folder on what its own pictures are worth."""

    def __init__(
        self,
        pretrained: str,
        reward: dict[str, Reward],
        weights: dict[str, float] | None = None,
        algorithm: Algorithm = GRPO(),  # noqa: B008
        advantages: Advantages = Advantages(),  # noqa: B008
        sampling: Sampling = Sampling(),  # noqa: B008
        optimizer: AdamW = AdamW(),  # noqa: B008
        kl: float = 0.0,
        old_rate: float = 1.0,
        max_grad_norm: float = 1.0,
        steps: int = 1000,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.pretrained, self.steps, self.seed, self.compile_blocks = pretrained, steps, seed, compile
        self.rewards, self.weights = reward, weights or dict.fromkeys(reward, 1.0)
        self.algorithm, self.advantages, self.sampling = algorithm, advantages, sampling
        self.optimizer_settings, self.kl, self.old_rate, self.max_grad_norm = optimizer, kl, old_rate, max_grad_norm
        self.transformer: Any = None
        self.waiting: list[Rollout] = []
        self.evaluations = 0
        self._pipeline: KontextPipeline | None = None

    def configure_model(self) -> None:
        """Loads the checkpoint folder; called again it does nothing."""
        if self.transformer is not None:
            return
        self._pipeline = KontextPipeline.from_pretrained(checkpoint_folder(self.pretrained))
        self._encoder = LatentEncoder(self._pipeline.vae)
        self._prompts = PromptCache(self._pipeline)
        self.transformer = self._pipeline.transformer
        self.transformer.requires_grad_(True).train()
        self.snapshots = Snapshots(dict(self.trainable_parameters()))
        for name, wanted in (("reference", self.kl > 0), ("old", self.old_rate < 1)):
            if wanted:
                self.snapshots.take(name)
        self.compile_blocks = self.compile_blocks and compile_blocks(self.transformer)

    def trainable_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def pipeline(self) -> KontextPipeline:
        assert self._pipeline is not None
        return self._pipeline.to(self.device)

    def latent_encoder(self) -> LatentEncoder:
        return LatentEncoder.from_pretrained(str(checkpoint_folder(self.pretrained)))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.waiting += self.collect(batch)
        if sum(len(rollout.keys) for rollout in self.waiting) >= self.sampling.groups:
            self.improve(self.packed())
            self.waiting = []

    @torch.no_grad()
    def collect(self, batch: ImageBatch) -> list[Rollout]:
        """Samples groups of each prompt and has them scored meanwhile; keeps those that teach something."""
        size = self.sampling.micro_groups
        pending: list[tuple[Rollout, Future[dict[str, list[float | None]]]]] = []
        with ThreadPoolExecutor(1) as pool, self.snapshots.using("old" if self.old_rate < 1 else None):
            for start in range(0, len(batch), size):
                part = batch.rows(start, start + size)
                rollout = self.sample(part)
                pictures = (decode_latents(self._pipeline.vae, rollout.trajectory.x0) / 2 + 0.5).clamp(0, 1)
                pending.append((rollout, pool.submit(self.score, pictures, self.requests(part))))
        found = []
        for rollout, future in pending:
            scores = future.result()
            shape = (len(rollout.keys), self.sampling.group_size)
            values = {n: torch.tensor([float("nan") if s is None else s for s in v]) for n, v in scores.items()}
            rollout.rewards = {name: value.reshape(shape) for name, value in values.items()}
            rollout.scored = torch.stack([v.isfinite().all(dim=1) for v in rollout.rewards.values()]).all(dim=0)
            total = weighted_sum(rollout.rewards, self.weights)
            useful = rollout.scored & self.advantages.useful(total.nan_to_num())
            self.log(f"reward/{rollout.task}", total[rollout.scored].mean(), prog_bar=True, batch_size=1)
            self.log("rollouts/useful", useful.float().mean(), prog_bar=True, batch_size=1)
            if useful.any():
                found.append(rollout.select(useful.nonzero().flatten().tolist()))
        return found

    def sample(self, batch: ImageBatch) -> Rollout:
        settings = self.sampling
        references = self.encode_references(batch)
        sequence, pooled = self._prompts(batch.prompts)
        algorithm = self.algorithm
        window = (0, 0)
        if algorithm.stochastic is not None:
            u = draw(torch.rand, (), self.seed, "window", torch.tensor([self.trainer.global_step]), torch.tensor([0]))
            window = algorithm.window.place(u.item())
        config = self._pipeline.scheduler.config
        sigmas = schedule(settings.num_inference_steps, config.shift, config.num_train_timesteps)
        height, width = batch.target.shape[-2:]
        if not batch.encoded:
            height, width = height // self._pipeline.vae_scale_factor, width // self._pipeline.vae_scale_factor
        shape = (self.transformer.config.in_channels, height, width)
        velocity = self.velocity(sequence, pooled, references, settings.group_size)
        trajectory = collect.sample(
            velocity, shape, batch, settings.group_size, sigmas, algorithm.stochastic, window, self.seed, self.device
        )
        self.evaluations += settings.num_inference_steps * len(trajectory.x0)
        return Rollout(
            batch.task, batch.keys, batch.prompts, batch.metadata or [], sequence, pooled, references, trajectory
        )

    def encode_references(self, batch: ImageBatch) -> Tensor | None:
        if batch.references is None:
            return None
        encoded = self._encoder.encode_batch(batch)
        noise = draw(
            torch.randn,
            (encoded.references.shape[2] // 2, *encoded.references.shape[3:]),
            self.seed,
            "posterior reference 0",
            batch.epochs,
            batch.sample_ids,
        ).to(self.device)
        return sample_latents(self._pipeline.vae, encoded.references[:, 0], noise)[:, None]

    def requests(self, batch: ImageBatch) -> list[Request]:
        metadata = batch.metadata or [{}] * len(batch)
        return [
            Request(prompt, (), facts)
            for prompt, facts in zip(batch.prompts, metadata, strict=True)
            for _ in range(self.sampling.group_size)
        ]

    def score(self, pictures: Tensor, requests: list[Request]) -> dict[str, list[float | None]]:
        return {name: reward.score(pictures, requests) for name, reward in self.rewards.items()}

    def velocity(self, sequence: Tensor, pooled: Tensor, references: Tensor | None, group_size: int) -> Velocity:
        """The transformer under its conditions, each group's repeated for its members."""
        sequence, pooled = sequence.repeat_interleave(group_size, 0), pooled.repeat_interleave(group_size, 0)
        if references is not None:
            references = references[:, 0].repeat_interleave(group_size, 0)
        scale = self.sampling.guidance_scale
        if scale != 1:
            s, p = (
                t.expand_as(like)
                for t, like in zip(self._prompts([self.sampling.negative_prompt]), (sequence, pooled), strict=True)
            )
            sequence, pooled = torch.cat([s, sequence]), torch.cat([p, pooled])
            references = None if references is None else torch.cat([references, references])

        def of(x: Tensor, sigma: Tensor) -> Tensor:
            copies = 1 if scale == 1 else 2
            v = self.transformer(
                hidden_states=torch.cat([x] * copies),
                ref_hidden_states=references,
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                timestep=1000 * torch.cat([sigma] * copies),
                return_dict=False,
            )[0].float()
            return v if scale == 1 else guide(*v.chunk(2), scale)

        return of

    def packed(self) -> list[Rollout]:
        """What waits, in batches of the geometry it was sampled in; what does not fill one is left out."""
        size, found = self.sampling.micro_groups, []
        for task in sorted({rollout.task for rollout in self.waiting}):
            whole = Rollout.join([rollout for rollout in self.waiting if rollout.task == task])
            found += [whole.select(range(i, i + size)) for i in range(0, len(whole.keys) - size + 1, size)]
        return found

    def improve(self, rollouts: list[Rollout]) -> None:
        """One update from all of them."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        total, logs = 0, []
        for number, rollout in enumerate(rollouts):
            velocity = self.velocity(rollout.sequence, rollout.pooled, rollout.references, rollout.group_size)
            advantages = self.advantages(rollout.rewards, self.weights).flatten().to(self.device)
            points = list(self.algorithm.points(rollout, partial(self.draw, number, len(rollout))))
            old = self.frozen("old", velocity, points) if self.old_rate < 1 else None
            reference = self.frozen("reference", velocity, points) if self.kl > 0 else None
            for i, point in enumerate(points):
                v = velocity(point.x, point.sigma)
                loss, metrics = self.algorithm.loss(
                    v, v.detach() if old is None else old[i], point, rollout, advantages
                )
                if reference is not None:
                    kl = velocity_divergence(v, reference[i])
                    loss = loss + self.kl * kl
                    metrics["kl"] = kl.detach().mean()
                loss = loss.mean()
                self.manual_backward(loss / (len(rollouts) * len(points)))
                total += loss.detach()
                logs.append(metrics)
            cost = 3 + (old is not None) + (reference is not None)
            self.evaluations += len(points) * len(rollout) * cost
        self._gradients.changed()
        self.log("train/grad_norm", self._gradients.norm(), batch_size=1)
        self._gradients.clip(self.max_grad_norm)
        optimizer.step()
        self.lr_schedulers().step()
        if self.old_rate < 1:
            self.snapshots.approach("old", self.old_rate)
        self.log("train/loss", total / len(logs), prog_bar=True, batch_size=1)
        for name in logs[0]:
            self.log(f"train/{name}", torch.stack([log[name] for log in logs]).mean(), batch_size=1)
        self.log("train/evaluations", float(self.evaluations), batch_size=1)

    @torch.no_grad()
    def frozen(self, name: str, velocity: Velocity, points: list[Point]) -> list[Tensor]:
        with self.snapshots.using(name):
            return [velocity(point.x, point.sigma) for point in points]

    def draw(self, batch: int, count: int, purpose: str, number: int, shape: tuple[int, ...]) -> Tensor:
        seed = counter_seed(self.seed, f"{purpose} {number}", self.trainer.global_step, batch)
        generator = torch.Generator().manual_seed(seed)
        sampler = torch.randn if purpose == "noise" else torch.rand
        return sampler((count, *shape), generator=generator)

    def configure_optimizers(self) -> Any:
        self._gradients = Gradients(p for _, p in self.trainable_parameters())
        optimizer, schedule = adamw(self.trainable_parameters(), self.optimizer_settings, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_backward(self, loss: Tensor) -> None:
        self._gradients.changed()

    def gradient_norm(self) -> Float[Tensor, ""]:
        return self._gradients.norm()
