"""Settings of a reinforcement run: how much is sampled, and what holds the policy back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.losses.forward_process import velocity_divergence
from lightning_modules.rollouts.algorithms import Algorithm, Point, RatioBased
from lightning_modules.rollouts.records import Rollout
from lightning_modules.samplers.ode import Solver


@dataclass
class Sampling:
    """How pictures are sampled to learn from.

    Attributes:
        group_size: pictures of each prompt, G.
        groups: groups that an update learns from, on all devices together; prompts are sampled until so many teach
            something.
        micro_groups: groups that are sampled, and later trained on, in one batch.
        num_inference_steps: steps of the sampler.
        guidance_scale: of classifier-free guidance, in sampling and in training; 1 needs half the evaluations.
        negative_prompt: the text of its negative branch.
        solver: of steps that are not stochastic, "euler" or "dpm2" (DPM-Solver++(2M)); None is "dpm2" where no step is
            stochastic, "euler" beside stochastic ones, as published.
    """

    group_size: int = 12
    groups: int = 8
    micro_groups: int = 4
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    solver: Solver | None = None

    def __post_init__(self) -> None:
        if self.group_size < 2 or min(self.groups, self.micro_groups, self.num_inference_steps) < 1:
            raise InputError(f"sampling: a group has at least 2 pictures, all else is at least 1; got {self}")


@dataclass
class Regularisation:
    """What holds the policy back.

    Attributes:
        velocity_kl: weight of the mean squared difference of its velocity from the reference's.
        latent_kl: weight of the KL divergence of its stochastic steps from the reference's, as Flow-GRPO has it.
        reference: checkpoint folder of that reference, such as the model that an earlier stage began with; None takes
            the weights that training starts from, which a stage's export holds merged. Beside adapters it needs the
            memory of another transformer.
        ema_kl: weight of the difference of its velocity from that of its own moving average.
        ema_decay: of that average.
        supervised: weight of the flow-matching loss on the prompts' own targets.
        anchor: weight of the mean squared difference of its velocity from the reference's on noisy targets of the last
            batch that no reward judges, every other one without its prompt, as guidance asks for it: what holds a task
            that is not reinforced (after Learning without Forgetting, arXiv 1606.09282).
        old_rate: how far the policy that samples follows the trained one after each update; 1 samples on policy.
        max_grad_norm: the norm that gradients are clipped to.
    """

    velocity_kl: float = 0.0
    latent_kl: float = 0.0
    reference: str | None = None
    ema_kl: float = 0.0
    ema_decay: float = 0.95
    supervised: float = 0.0
    anchor: float = 0.0
    old_rate: float = 1.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        weights = self.velocity_kl, self.latent_kl, self.ema_kl, self.supervised, self.anchor
        if min(weights) < 0 or self.max_grad_norm <= 0:
            raise InputError(f"regularisation: weights are at least 0, max_grad_norm is above 0; got {self}")
        if self.reference is not None and "reference" not in self.snapshots:
            raise InputError(
                "regularisation.reference is of no use without velocity_kl, latent_kl or anchor; set one above 0"
            )
        if not 0 < self.old_rate <= 1 or not 0 <= self.ema_decay < 1:
            raise InputError(f"regularisation: 0 < old_rate <= 1 and 0 <= ema_decay < 1; got {self}")

    @property
    def sampler(self) -> str | None:
        """The copy of the policy that samples; None where the trained weights do."""
        return "old" if self.old_rate < 1 else None

    @property
    def snapshots(self) -> dict[str, float]:
        """The copies of the policy that are needed, and the share that each follows it by after an update."""
        wanted = {
            "reference": (self.velocity_kl + self.latent_kl + self.anchor > 0, 0.0),
            "old": (self.sampler is not None, self.old_rate),
            "ema": (self.ema_kl > 0, 1 - self.ema_decay),
        }
        return {name: rate for name, (needed, rate) in wanted.items() if needed}

    def tightened(self, factor: float) -> Regularisation:
        """Held so many times as tightly to the reference."""
        if not self.velocity_kl + self.latent_kl + self.anchor:
            raise InputError("nothing to hold tighter: set regularisation.velocity_kl, latent_kl or anchor above 0")
        velocity, latent, anchor = (factor * weight for weight in (self.velocity_kl, self.latent_kl, self.anchor))
        return replace(self, velocity_kl=velocity, latent_kl=latent, anchor=anchor)

    @property
    def asked(self) -> list[str]:
        """The copies that are asked at each point of a rollout: the reference only where a KL term is."""
        held = self.velocity_kl + self.latent_kl > 0
        return [name for name in self.snapshots if held or name != "reference"]

    def divergences(
        self, algorithm: Algorithm, v: Tensor, others: Mapping[str, Tensor], point: Point, rollout: Rollout
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Names, weights, and a divergence a sample, of a velocity at a point from those of the copies there."""
        if self.velocity_kl > 0:
            yield "velocity_kl", self.velocity_kl, velocity_divergence(v, others["reference"])
        if self.ema_kl > 0:
            yield "ema_kl", self.ema_kl, velocity_divergence(v, others["ema"])
        if self.latent_kl > 0 and isinstance(algorithm, RatioBased):
            divergence = algorithm.latent_divergence(v, others["reference"], point, rollout)
            yield "latent_kl", self.latent_kl, divergence
