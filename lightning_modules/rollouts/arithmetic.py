"""What an update is made of: prompts, groups, micro-batches, pictures, and evaluations of the transformer.

An evaluation is one picture's forward pass. A backward pass counts 2, where only adapters are trained 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from data_pipeline.errors import InputError
from lightning_modules.rollouts.algorithms import Algorithm, RatioBased
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.samplers.timesteps import schedule


@dataclass(frozen=True)
class Arithmetic:
    """Of one update, made by `resolve`.

    Attributes:
        sampling: groups are those of all devices together.
        points: where the policy is asked again about each picture that it learns from.
        backward: evaluations that a backward pass counts, recomputed activations included.
        copies: other policies that are asked at each point.
        supervised: whether it learns from the targets of a batch, too.
        anchored: whether it is held to the reference on those of another batch.
        devices: each samples and learns from its share of the groups.
        prompts: of a device's batch; None where they differ from batch to batch.
    """

    sampling: Sampling
    points: int
    backward: int
    copies: int
    supervised: bool
    anchored: bool
    devices: int
    prompts: int | None

    def __post_init__(self) -> None:
        groups, micro = self.sampling.groups, self.sampling.micro_groups
        if groups % (self.devices * micro):
            smaller = [m for m in range(1, micro) if groups % (self.devices * m) == 0]
            other = f", or micro_groups {smaller[-1]}" if smaller else ""
            raise InputError(
                f"sampling: groups {groups} must be a multiple of micro_groups {micro} x devices {self.devices}; "
                f"nearest are groups {multiples(groups, self.devices * micro)}{other}"
            )
        if self.prompts is not None and self.prompts % micro:
            raise InputError(
                f"data: a batch of {self.prompts} prompts must be a multiple of sampling.micro_groups {micro}, so that "
                "what is sampled together is learned from together; nearest is a batch_size of "
                f"{multiples(self.prompts, micro)}"
            )

    @property
    def groups(self) -> int:
        """Groups that a device waits for."""
        return self.sampling.groups // self.devices

    @property
    def micro_batches(self) -> int:
        """Batches that a device learns from, at the least."""
        return self.groups // self.sampling.micro_groups

    @property
    def sampled(self) -> int:
        """Pictures that all devices sample, at the least: where every group teaches something."""
        groups = self.groups if self.prompts is None else ceil(self.groups / self.prompts) * self.prompts
        return self.devices * groups * self.sampling.group_size

    @property
    def branches(self) -> int:
        """Evaluations of a velocity: with guidance another one without the prompt."""
        return 1 if self.sampling.guidance_scale == 1 else 2

    @property
    def to_sample(self) -> int:
        """Evaluations that a sampled picture costs."""
        return self.branches * self.sampling.num_inference_steps

    @property
    def to_train(self) -> int:
        """Evaluations that a picture costs that is learned from, beyond those to sample it."""
        return self.branches * self.points * (1 + self.backward + self.copies)

    @property
    def to_supervise(self) -> int:
        """Evaluations that a target of the supervised loss costs."""
        return 1 + self.backward if self.supervised else 0

    @property
    def to_anchor(self) -> int:
        """Evaluations that a target costs on which the policy is held to the reference."""
        return 2 + self.backward if self.anchored else 0

    def table(self) -> str:
        """All of it, for people."""
        s, prompts, micro = self.sampling, self.prompts, self.sampling.micro_groups
        guided = f"{self.branches} x " if self.branches > 1 else ""
        point = f"{guided}(forward 1, backward {self.backward}, other policies {self.copies})"
        beside = self.devices * (prompts or 0) * (self.to_supervise + self.to_anchor)
        total = self.sampled * (self.to_sample + self.to_train) + beside
        rows = {
            "prompts": f"{prompts or 'any number'} a batch and device, until {s.groups} groups teach something",
            "micro-batch": f"groups x pictures: {micro} x {s.group_size}; {self.micro_batches} a device or more",
            "pictures": f"{self.sampled:,} sampled and {s.groups * s.group_size:,} learned from, or more",
            "to sample": f"{self.to_sample} evaluations a picture: {guided}{s.num_inference_steps} steps",
            "to learn": f"{self.to_train} evaluations a picture: {self.points} points x {point}",
            "in all": f"{total:,} evaluations where every group teaches: {total / self.sampled:.1f} a picture",
        }
        return "\n".join([f"an update, devices {self.devices}:", *(f"  {n:12} {text}" for n, text in rows.items())])


def resolve(
    sampling: Sampling,
    algorithm: Algorithm,
    regularisation: Regularisation,
    adapters: bool = False,
    recompute: bool = False,
    devices: int = 1,
    prompts: int | None = None,
) -> Arithmetic:
    """The arithmetic of these settings.

    InputError, with the nearest that work, where groups cannot be shared out, or where `require_noise` finds a fault.

    Args:
        sampling, algorithm, regularisation: as a run has them.
        adapters: whether only LoRA is trained.
        recompute: whether activations are computed again in the backward pass.
        devices: that train.
        prompts: of a device's batch.
    """
    if isinstance(algorithm, RatioBased):
        require_noise(sampling, algorithm, regularisation)
    backward = (1 if adapters else 2) + recompute
    copies, points = len(regularisation.asked), algorithm.points_per_picture
    targets = regularisation.supervised > 0, regularisation.anchor > 0
    return Arithmetic(sampling, points, backward, copies, *targets, devices, prompts)


def require_noise(sampling: Sampling, algorithm: RatioBased, regularisation: Regularisation) -> None:
    """InputError where a window leaves the schedule, or divides by the noise of a step that adds next to none."""
    steps, (first, last) = sampling.num_inference_steps, algorithm.window.within
    if last > steps:
        raise InputError(
            f"algorithm.window: within {first} to {last} ends after the last of sampling.num_inference_steps {steps}; "
            f"let it end at {steps} or before, or take more steps"
        )
    kl = regularisation.latent_kl > 0
    if algorithm.steps.unit == "squared" and not kl:
        return  # neither its log-probability nor its divergence divides by the standard deviation
    # Which steps add no noise is the same for every shift.
    levels = schedule(steps).tolist()
    silent = [
        i for i in range(first, last) if not algorithm.steps.coefficients(levels[i], levels[i + 1], levels[1]).std
    ]
    if silent:
        raise InputError(
            f"algorithm: {algorithm.sampler!r} adds no noise at step {silent[0]} of {steps}, and "
            f"{'latent_kl' if kl else 'its log-probability'} divides by it; take a noise above 0, and a window within "
            f"{first} to {steps - 1} at the most{', or velocity_kl' if kl else ''}"
        )
    # The last level but one is next to 0. So is the noise that leads there, where a sampler keeps the variance: a ratio
    # weighs a change of the velocity several hundred times as much as a step before.
    if algorithm.sampler in ("cps", "precise") and last > steps - 2 and (kl or not algorithm.normalised):
        raise InputError(
            f"algorithm: {algorithm.sampler!r} adds next to no noise at step {steps - 2} of {steps}, and "
            f"{'latent_kl' if kl else 'its log-probability'} divides by its square; take a window within {first} to "
            f"{steps - 2} at the most, or {'velocity_kl' if kl else 'GRPOGuard, which normalises ratios'}"
        )


def multiples(number: int, divisor: int) -> str:
    """The nearest multiples, below and above, for a message.

    >>> multiples(10, 4), multiples(3, 4)
    ('8 or 12', '4')
    """
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
