"""Named algorithms of online RL: where a policy is asked again about what it sampled, and the loss there.

Each knows points (a state and a noise level) and a loss of the velocity at a point under the weights that are trained
and under those that sampled. The optimiser loop knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.losses.forward_process import contrast, diffusion_nft, matching_log_prob, optimality
from lightning_modules.losses.policy_gradient import divergence_mask, gaussian_divergence, guarded_ratio, ppo_clip
from lightning_modules.rollouts.records import Rollout
from lightning_modules.samplers import path, sde
from lightning_modules.samplers.sde import SAMPLERS, Coefficients, Stochastic, Unit

Draw = Callable[[str, int, tuple[int, ...]], Tensor]  # purpose, number, shape of one sample -> (B, ...) normal or (B,)
Samples = Float[Tensor, " b"]


class Point(NamedTuple):
    """Where a policy is asked: states (B, ...), noise levels (B,); the step's number or the noise that was mixed in."""

    x: Tensor
    sigma: Tensor
    step: int = -1
    noise: Tensor | None = None


@runtime_checkable
class Algorithm(Protocol):
    """An algorithm."""

    @property
    def points_per_picture(self) -> int:
        """How many points it asks about."""

    def stochastic(self) -> Stochastic | None:
        """What samples; None for the ODE."""

    def window_at(self, u: float) -> tuple[int, int]:
        """The stochastic steps, first and end, at a uniform draw in [0, 1)."""

    def points(self, rollout: Rollout, draw: Draw) -> Iterator[Point]:
        """Where the policy is asked about a rollout."""

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One loss a sample at a point, and what to log of it."""


@dataclass
class Window:
    """Steps that are stochastic and trained on: `size` consecutive ones, beginning anywhere in `within` (excluded end).

    One window is drawn for all groups of an iteration: windows that differ within a group would add their own noise to
    its rewards.
    """

    size: int = 3
    within: tuple[int, int] = (0, 5)

    def __post_init__(self) -> None:
        first, last = self.within
        if self.size < 1 or first < 0 or first + self.size > last:
            raise InputError(f"window: {self.size} steps do not fit within {first} to {last}; widen or shorten it")

    def place(self, u: float) -> tuple[int, int]:
        """The window at a uniform draw in [0, 1)."""
        first, last = self.within
        start = first + int(u * (last - self.size + 1 - first))
        return start, start + self.size


@dataclass
class RatioBased:
    """What algorithms share that compare the policy with the one that sampled, step by step.

    Attributes:
        sampler: "flow", "dance", "cps" or "precise".
        noise: its noise level; None takes the sampler's own.
        unit: what the limits below are measured in; it must be the unit of the sampler's log-probability.
        window: the stochastic steps.
        normalised: whether ratios of all steps are brought to one scale.
    """

    sampler: Literal["flow", "dance", "cps", "precise"] = "cps"
    noise: float | None = None
    unit: Unit = "squared"
    window: Window = field(default_factory=Window)
    normalised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps.unit != self.unit:
            raise InputError(
                f"{type(self).__name__}: its limits are in the unit {self.unit!r}, and {self.sampler!r} has "
                f"log-probabilities in {self.steps.unit!r}; choose limits for that unit and name it, or another "
                "sampler"
            )

    @property
    def steps(self) -> Stochastic:
        """The sampler."""
        kind = SAMPLERS[self.sampler]
        return kind() if self.noise is None else kind(self.noise)

    def stochastic(self) -> Stochastic | None:  # annotated as in the protocol: configs are checked against it
        """The sampler."""
        return self.steps

    def window_at(self, u: float) -> tuple[int, int]:
        """One window for all groups of an update."""
        return self.window.place(u)

    @property
    def points_per_picture(self) -> int:
        """One for each stochastic step."""
        return self.window.size

    def points(self, rollout: Rollout, draw: Draw) -> Iterator[Point]:
        """The states before each stochastic step."""
        t = rollout.trajectory
        for place, i in enumerate(range(*t.window)):
            yield Point(t.states[place], t.sigmas[i].expand(len(rollout)).to(t.x0.device), i)

    def compare(self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout) -> Comparison:
        """The step that was taken, under both velocities."""
        t, i, sampler = rollout.trajectory, point.step, self.steps
        log_prob, mean, c = sde.replay(v, t, sampler, i)
        old, old_mean, _ = sde.replay(v_old, t, sampler, i)
        return Comparison(log_prob, log_prob - old, mean, old_mean, c, t.sigmas[i].item() - t.sigmas[i + 1].item())

    # Flow-GRPO (arXiv 2505.05470), equation 7, with the diffusion coefficient alone in the denominator as in its code.
    def latent_divergence(self, v: Tensor, reference: Tensor, point: Point, rollout: Rollout) -> Samples:
        """KL divergence from the reference's step, over -dt: mean (mu - mu_ref)^2 / (2 s_t^2)."""
        found = self.compare(v, reference, point, rollout)
        diffusion = found.coefficients.std / found.dt**0.5
        return gaussian_divergence(found.mean, found.old_mean, diffusion)


class Comparison(NamedTuple):
    """One step under two policies; `dt` is sigma - sigma'."""

    log_prob: Tensor
    log_ratio: Tensor
    mean: Tensor
    old_mean: Tensor
    coefficients: Coefficients
    dt: float


RATIO_METRICS = ("ratio_mean", "ratio_std", "clipped")


def ratio_metrics(ratio: Samples, cut: Tensor) -> dict[str, Tensor]:
    """Mean and spread of ratios, and the share that a limit holds back."""
    ratio = ratio.detach()
    found = ratio.mean(), ratio.std(correction=0), cut.float().mean()
    return dict(zip(RATIO_METRICS, found, strict=True))


def by_step(metrics: Mapping[str, Tensor], point: Point, rollout: Rollout) -> dict[str, Tensor]:
    """Those of ratios under a name of their own at each stochastic step, which differ by orders of magnitude.

    >>> point, rollout = Point(x, sigma, step=3), sampled_with_a_window_over_it  # doctest: +SKIP
    >>> list(by_step({"ratio_std": std, "divergence": other}, point, rollout))  # doctest: +SKIP
    ['ratio_std/step_3']
    """
    first, last = rollout.trajectory.window
    if point.noise is not None or not first <= point.step < last:
        return {}
    return {f"{name}/step_{point.step}": value for name, value in metrics.items() if name in RATIO_METRICS}


# As published with each: Flow-GRPO and DanceGRPO, Flow-GRPO-Fast with CPS, Precise (arXiv 2605.23522).
CLIPS = {"flow": 1e-4, "dance": 1e-4, "cps": 1e-5, "precise": 4e-6}


@dataclass
class GRPO(RatioBased):
    """Flow-GRPO (arXiv 2505.05470) with PPO's clip; by default its fast variant: a window, CPS noise, no guidance.

    Attributes:
        clip: of the ratio; None takes the one that was published with the sampler.
    """

    clip: float | None = None

    @property
    def clip_range(self) -> float:
        """How far a ratio may be from 1."""
        return CLIPS[self.sampler] if self.clip is None else self.clip

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio, clip = torch.exp(self.compare(v, v_old, point, rollout).log_ratio), self.clip_range
        return ppo_clip(ratio, advantages, clip), ratio_metrics(ratio, (ratio - 1).abs() > clip)


@dataclass
class FlowDPPO(RatioBased):
    """Flow-DPPO (arXiv 2606.11025): a mask by divergence in place of a clip by ratio.

    With a sampler whose unit is "squared" the divergence is the plain mean square of the means' difference.

    Attributes:
        limit: of the divergence; as published, for that of Gaussians and Flow-GRPO's sampler with noise 0.7.
    """

    sampler: Literal["flow", "dance", "cps", "precise"] = "flow"
    unit: Unit = "gaussian"
    limit: float = 1e-5

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.compare(v, v_old, point, rollout)
        ratio = torch.exp(found.log_ratio)
        std = found.coefficients.std if self.unit == "gaussian" else 0.5**0.5
        divergence = gaussian_divergence(found.mean.detach(), found.old_mean, std)
        loss = divergence_mask(ratio, advantages, divergence, self.limit)
        return loss, ratio_metrics(ratio, divergence >= self.limit) | {"divergence": divergence.mean()}


# As published: GRPO-Guard's, and Precise's with its RatioNorm.
GUARDED_CLIPS = {"flow": 2e-6, "dance": 2e-6, "precise": 4e-6}


@dataclass
class GRPOGuard(RatioBased):
    """GRPO-Guard (arXiv 2510.22319): ratios normalised step by step; with "precise" the RatioNorm that was published
    with that sampler (arXiv 2605.23522). For log-probabilities in the Gaussian unit.

    Attributes:
        clip: of the normalised ratio; None takes the one that was published with the sampler.
    """

    sampler: Literal["flow", "dance", "cps", "precise"] = "flow"
    unit: Unit = "gaussian"
    clip: float | None = None
    normalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in GUARDED_CLIPS:
            raise InputError(f'GRPOGuard is defined for "flow", "dance" and "precise", not {self.sampler!r}')

    @property
    def clip_range(self) -> float:
        """How far a ratio may be from 1."""
        return GUARDED_CLIPS[self.sampler] if self.clip is None else self.clip

    def gain(self, found: Comparison) -> float:
        """What a step multiplies a change of the velocity by: -dt of the flow, which GRPO-Guard divides by; |dmean/dv|
        in closed form, which Precise divides by."""
        return abs(found.coefficients.v) if self.sampler == "precise" else found.dt

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found, clip = self.compare(v, v_old, point, rollout), self.clip_range
        divergence = gaussian_divergence(found.mean, found.old_mean, found.coefficients.std)
        ratio = guarded_ratio(found.log_ratio, divergence, found.coefficients.std)
        loss = ppo_clip(ratio, advantages, clip) / self.gain(found)
        return loss, ratio_metrics(ratio, (ratio - 1).abs() > clip)


@dataclass
class ForwardProcess:
    """What algorithms share that noise the sampled pictures anew.

    Attributes:
        points_per_picture: noise levels of each, one from each of as many equal parts of (0, 1).
    """

    points_per_picture: int = 4

    def stochastic(self) -> Stochastic | None:
        """The ODE samples."""
        return None

    def window_at(self, u: float) -> tuple[int, int]:
        """No step is stochastic."""
        return 0, 0

    def points(self, rollout: Rollout, draw: Draw) -> Iterator[Point]:
        """Each picture at noise levels of its own."""
        x0 = rollout.trajectory.x0
        for number in range(self.points_per_picture):
            u = draw("sigma", number, ()).to(x0)
            sigma = ((number + u) / self.points_per_picture).clamp(1e-3, 1 - 1e-3)
            noise = draw("noise", number, tuple(x0.shape[1:])).to(x0)
            yield Point(path.interpolate(x0, noise, sigma), sigma, number, noise)


@dataclass
class DiffusionNFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117): contrasts good and bad pictures in the forward process.

    Attributes:
        beta: how far v+ and v- lie from the old velocity.
        advantage_limit: what counts as entirely good or bad.
    """

    beta: float = 1.0
    advantage_limit: float = 5.0

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r = optimality(advantages, self.advantage_limit)
        towards, away = contrast(v, v_old, self.beta)
        positive, negative = (path.denoise(point.x, each, point.sigma) for each in (towards, away))
        loss = diffusion_nft(positive, negative, rollout.trajectory.x0, r, self.beta)
        return self.advantage_limit * loss, {"optimality": r.mean()}


@dataclass
class AWM(ForwardProcess):
    """Advantage-weighted matching (arXiv 2509.25050): the flow-matching loss as log-probability, and PPO's loss on it.

    Attributes:
        points_per_picture: as those of ForwardProcess.
        clip: of the ratio; 1 is as good as none.
        power: of the generalised Huber loss.
        advantage_limit: the advantage that weighs 1.
    """

    points_per_picture: int = 6
    clip: float = 1.0
    power: float = 0.25
    advantage_limit: float = 5.0

    def loss(
        self, v: Tensor, v_old: Tensor, point: Point, rollout: Rollout, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert point.noise is not None
        target = path.velocity(rollout.trajectory.x0, point.noise)
        new, old = (matching_log_prob(each, target, point.sigma, self.power) for each in (v, v_old))
        ratio = torch.exp(new - old).to(advantages.dtype)
        weights = (advantages / self.advantage_limit).clamp(-1, 1)
        return ppo_clip(ratio, weights, self.clip), ratio_metrics(ratio, (ratio - 1).abs() > self.clip)
