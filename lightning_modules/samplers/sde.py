"""Stochastic sampling: each step is a Gaussian whose log-probability reinforcement learning differentiates.

Every sampler's step is x' = a x + b v + s z, with a, b and s functions of the two noise levels alone, so that one
`transition` and one `log_prob` serve sampling and replay alike. Convention and notation of `path`; dt = sigma' - sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.samplers import ode
from lightning_modules.samplers.ode import Solver, Velocity

Unit = Literal["gaussian", "squared"]


class Coefficients(NamedTuple):
    """Of one step: mean = x * a + v * b, standard deviation s."""

    x: float
    v: float
    std: float


@runtime_checkable
class Stochastic(Protocol):
    """A stochastic sampler."""

    @property
    def unit(self) -> Unit:
        """What its log-probability is measured in: "gaussian" is the mean over elements of the log-density, "squared"
        of -(x' - mean)^2 alone. Clip ranges of one do not fit the other.
        """

    def coefficients(self, sigma: float, following: float, second: float) -> Coefficients:
        """Of the step from `sigma` to `following`; `second` is the schedule's second level."""


# Flow-GRPO (arXiv 2505.05470), equation 9; its code replaces sigma = 1 by the second level in the denominator.
@dataclass(frozen=True)
class FlowSDE:
    """s_t = noise sqrt(sigma / (1 - sigma))."""

    noise: float = 0.7
    unit: Unit = "gaussian"

    def coefficients(self, sigma: float, following: float, second: float) -> Coefficients:
        diffusion = self.noise * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
        return reverse_sde(diffusion, sigma, following)


# DanceGRPO (arXiv 2505.07818), equation 8: the same with a constant s_t.
@dataclass(frozen=True)
class DanceSDE:
    """s_t = noise."""

    noise: float = 0.3
    unit: Unit = "gaussian"

    def coefficients(self, sigma: float, following: float, second: float) -> Coefficients:
        return reverse_sde(self.noise, sigma, following)


# Flow-CPS (arXiv 2509.05952): the noise that is added is taken from the predicted noise, so that no variance is gained.
@dataclass(frozen=True)
class CPS:
    """s = sigma' sin(noise pi / 2)."""

    noise: float = 0.8
    unit: Unit = "squared"

    def coefficients(self, sigma: float, following: float, second: float) -> Coefficients:
        return preserving(following * math.sin(self.noise * math.pi / 2), sigma, following)


# Precise (arXiv 2605.23522): the variance that the exact reverse process adds between two levels.
@dataclass(frozen=True)
class Precise:
    """s = sigma' sqrt(1 - (sigma' (1 - sigma) / (sigma (1 - sigma')))^(noise^2))."""

    noise: float = 1.5
    unit: Unit = "gaussian"

    def coefficients(self, sigma: float, following: float, second: float) -> Coefficients:
        ratio = following * (1 - sigma) / (sigma * (1 - following))
        std = following * math.sqrt(1 - ratio ** (self.noise**2)) if self.noise else 0.0
        return preserving(std, sigma, following)


SAMPLERS: dict[str, type[FlowSDE] | type[DanceSDE] | type[CPS] | type[Precise]] = {
    "flow": FlowSDE,
    "dance": DanceSDE,
    "cps": CPS,
    "precise": Precise,
}


def reverse_sde(diffusion: float, sigma: float, following: float) -> Coefficients:
    """Euler-Maruyama of dx = (v - s_t^2 score / 2) dt + s_t dw, with score = -(x + (1 - sigma) v) / sigma."""
    dt = following - sigma
    drift = diffusion**2 / (2 * sigma)
    return Coefficients(1 + drift * dt, (1 + drift * (1 - sigma)) * dt, diffusion * math.sqrt(-dt))


def preserving(std: float, sigma: float, following: float) -> Coefficients:
    """Mean (1 - sigma') x0 + sqrt(sigma'^2 - s^2) eps, which keeps the marginal's variance (as DDIM with noise)."""
    kept = math.sqrt(following**2 - std**2)
    return Coefficients(1 - following + kept, -sigma * (1 - following) + (1 - sigma) * kept, std)


def transition(c: Coefficients, x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Mean of the next state, in fp32."""
    return c.x * x.float() + c.v * v.float()


def log_prob(
    c: Coefficients, unit: Unit, following: Float[Tensor, "b ..."], mean: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """Of the next state under a transition, averaged over elements, in the sampler's unit."""
    squared = (following.detach().float() - mean).square().flatten(1).mean(dim=1)
    if unit == "squared":
        return -squared
    return -squared / (2 * c.std**2) - math.log(c.std) - 0.5 * math.log(2 * math.pi)


@dataclass
class Trajectory:
    """What a policy did.

    Attributes:
        sigmas: (n + 1,) noise levels.
        window: (first, last + 1) of the stochastic steps.
        states: (w + 1, B, ...) fp32, before the first of them to after the last.
        log_probs: (w, B) of the w stochastic steps.
        x0: (B, ...) what was sampled.
    """

    sigmas: Float[Tensor, " n"]
    window: tuple[int, int]
    states: Float[Tensor, "w b ..."]
    log_probs: Float[Tensor, "k b"]
    x0: Float[Tensor, "b ..."]


def sample(
    velocity: Velocity,
    x: Float[Tensor, "b ..."],
    sigmas: Float[Tensor, " n"],
    sampler: Stochastic | None,
    window: tuple[int, int],
    noise: Callable[[int], Tensor],
    solver: Solver = "euler",
) -> Trajectory:
    """Walks `sigmas`: stochastic steps within the window, a solver's outside; `noise(i)` is step i's (B, ...).

    Without a window, which needs no sampler, this is the ODE. A multistep solver begins anew behind the window: what a
    stochastic step predicted is of another path.
    """
    x, levels = x.float(), sigmas.tolist()
    states, log_probs = [x], []
    before: Tensor | None = None
    for i in range(len(levels) - 1):
        v = velocity(x, sigmas[i].expand(len(x)).to(x.device)).float()
        if window[0] <= i < window[1]:
            if sampler is None:
                raise ValueError(f"stochastic steps {window} need a sampler")
            mean, c = step(v, x, sigmas, sampler, i)
            x, before = mean + c.std * noise(i).to(x), None
            log_probs.append(log_prob(c, sampler.unit, x, mean))
            states.append(x)
        else:
            x, before = ode.step(solver, x, v, levels, i, before)
            if i < window[0]:
                states = [x]
    chances = torch.stack(log_probs) if log_probs else x.new_zeros(0, len(x))
    return Trajectory(sigmas, window, torch.stack(states), chances, x)


def replay(
    v: Float[Tensor, "b ..."], trajectory: Trajectory, sampler: Stochastic, i: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b ..."], Coefficients]:
    """Log-probability of what was done at step `i`, under a policy whose velocity there is `v`; mean; coefficients."""
    place = i - trajectory.window[0]
    mean, c = step(v, trajectory.states[place], trajectory.sigmas, sampler, i)
    return log_prob(c, sampler.unit, trajectory.states[place + 1], mean), mean, c


def step(
    v: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], sigmas: Float[Tensor, " n"], sampler: Stochastic, i: int
) -> tuple[Float[Tensor, "b ..."], Coefficients]:
    """Mean and coefficients of step `i`."""
    c = sampler.coefficients(sigmas[i].item(), sigmas[i + 1].item(), sigmas[1].item())
    return transition(c, x, v), c
