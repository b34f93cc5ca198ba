"""Losses of algorithms on one step that is small enough to be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from data_pipeline.errors import InputError
from lightning_modules.rollouts.algorithms import GRPO, FlowDPPO, GRPOGuard, Point, RatioBased, Window, by_step
from lightning_modules.rollouts.arithmetic import resolve
from lightning_modules.rollouts.records import Rollout
from lightning_modules.rollouts.settings import Regularisation, Sampling
from lightning_modules.samplers.sde import Trajectory
from lightning_modules.samplers.timesteps import schedule

SIGMA, FOLLOWING = 0.6, 0.4
STATE, NEXT, OLD, NEW = 0.5, 0.3, 0.2, 0.21  # of one element: states, and velocities of both policies


def one_step(sigmas: list[float]) -> tuple[Point, Rollout]:
    """A rollout of two pictures of one element, whose second step is stochastic."""
    states = torch.tensor([STATE, NEXT]).reshape(2, 1, 1, 1, 1).repeat(1, 2, 1, 1, 1)
    trajectory = Trajectory(torch.tensor(sigmas), (1, 2), states, torch.zeros(1, 2), torch.zeros(2, 1, 1, 1))
    rollout = Rollout("edit", ["k"], ["p"], [{}], torch.zeros(1, 1, 1), torch.zeros(1, 1), None, trajectory)
    return Point(states[0], torch.full((2,), sigmas[1]), 1), rollout


def velocities(v: float) -> torch.Tensor:
    """The same for both pictures."""
    return torch.full((2, 1, 1, 1), v)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["published clip", "no clip"])
def test_the_normalised_ratio_of_precise_is_that_by_hand(clip: float | None) -> None:
    """RatioNorm: exp((log r + (mu - mu_old)^2 / 2 s^2) s), and the loss over |dmu/dv|."""
    share = (FOLLOWING * (1 - SIGMA) / (SIGMA * (1 - FOLLOWING))) ** (1.5**2)
    std = FOLLOWING * math.sqrt(1 - share)
    kept = math.sqrt(FOLLOWING**2 - std**2)
    slope = (1 - SIGMA) * kept - SIGMA * (1 - FOLLOWING)

    def mean(v: float) -> float:
        return (1 - FOLLOWING) * (STATE - SIGMA * v) + kept * (STATE + (1 - SIGMA) * v)

    assert (mean(1.0) - mean(0.0)) == pytest.approx(slope)
    log_ratio = ((NEXT - mean(OLD)) ** 2 - (NEXT - mean(NEW)) ** 2) / (2 * std**2)
    ratio = math.exp((log_ratio + (mean(NEW) - mean(OLD)) ** 2 / (2 * std**2)) * std)
    # The bias that RatioNorm adds is what makes the exponent linear in the change of the mean.
    assert ratio == pytest.approx(math.exp((NEXT - mean(OLD)) * (mean(NEW) - mean(OLD)) / std))
    algorithm = GRPOGuard("precise", clip=clip, window=Window(1, (1, 2)))
    limit = 4e-6 if clip is None else clip
    assert algorithm.clip_range == limit and abs(ratio - 1) > 4e-6
    advantages = torch.tensor([2.0, -2.0])
    clipped = min(max(ratio, 1 - limit), 1 + limit)
    wanted = [max(-a * ratio, -a * clipped) / abs(slope) for a in advantages.tolist()]
    point, rollout = one_step([0.9, SIGMA, FOLLOWING, 0.0])
    loss, metrics = algorithm.loss(velocities(NEW), velocities(OLD), point, rollout, advantages)
    assert loss.tolist() == pytest.approx(wanted, rel=1e-5)
    assert metrics["ratio_mean"].item() == pytest.approx(ratio, rel=1e-6)
    assert metrics["clipped"].item() == (1.0 if clip is None else 0.0)


def test_a_guarded_flow_step_is_divided_by_its_length() -> None:
    assert [GRPOGuard(name).clip_range for name in ("flow", "dance", "precise")] == [2e-6, 2e-6, 4e-6]
    point, rollout = one_step([0.9, SIGMA, FOLLOWING, 0.0])
    algorithm = GRPOGuard("flow", window=Window(1, (1, 2)))
    loss, _ = algorithm.loss(velocities(OLD), velocities(OLD), point, rollout, torch.ones(2))
    assert loss.tolist() == pytest.approx([-1 / (SIGMA - FOLLOWING)] * 2, rel=1e-5)


def test_normalised_ratios_move_alike_at_every_step() -> None:
    """The same change of the velocity: plain log-ratios differ a hundredfold, normalised gradients do not."""
    sigmas = schedule(10, 3.0).tolist()
    plain, normalised = [], []
    for i in (2, 8):
        point, rollout = one_step([sigmas[i - 1], sigmas[i], sigmas[i + 1], 0.0])
        # What happened lies one standard deviation from the old mean.
        guard, grpo = (kind("precise", unit="gaussian", window=Window(1, (1, 2))) for kind in (GRPOGuard, GRPO))
        found = guard.compare(velocities(OLD), velocities(OLD), point, rollout)
        rollout.trajectory.states[1] = found.mean + found.coefficients.std
        for algorithm, slopes in ((grpo, plain), (guard, normalised)):
            v = velocities(OLD).requires_grad_()
            loss, _ = algorithm.loss(v, velocities(OLD), point, rollout, -torch.ones(2))
            slopes.append(torch.autograd.grad(loss.sum(), v)[0].abs().max().item())
    assert plain[1] / plain[0] > 100 and normalised[1] / normalised[0] == pytest.approx(1, rel=1e-2)


STEEP = Window(1, (0, 9))


@pytest.mark.parametrize(
    ("algorithm", "kl", "match"),
    [
        (
            GRPO("precise", unit="gaussian", window=STEEP),
            0.0,
            "step 8 of 10, .* within 0 to 8 at the most, or GRPOGuard",
        ),
        (FlowDPPO("precise", window=STEEP), 0.0, "its log-probability divides by its square"),
        (GRPOGuard("precise", window=STEEP), 0.1, "latent_kl divides by its square.*, or velocity_kl"),
        (GRPO("cps", window=STEEP), 0.1, "latent_kl divides by its square"),
    ],
)
def test_steps_of_next_to_no_noise_are_refused_where_ratios_are_not_normalised(
    algorithm: RatioBased, kl: float, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        resolve(Sampling(), algorithm, Regularisation(latent_kl=kl))


@pytest.mark.parametrize(
    "algorithm",
    [
        GRPOGuard("precise", window=STEEP),
        GRPO("precise", unit="gaussian", window=Window(1, (0, 8))),
        GRPO("cps", window=Window(1, (0, 10))),
        GRPO("flow", unit="gaussian", window=Window(1, (0, 10))),
    ],
)
def test_other_windows_may_reach_the_last_steps(algorithm: RatioBased) -> None:
    assert resolve(Sampling(), algorithm, Regularisation()).points == 1


def test_only_figures_of_ratios_at_stochastic_steps_have_a_name_of_their_own() -> None:
    point, rollout = one_step([0.9, SIGMA, FOLLOWING, 0.0])
    metrics = {"ratio_std": torch.ones(()), "divergence": torch.ones(())}
    assert list(by_step(metrics, point, rollout)) == ["ratio_std/step_1"]
    assert by_step(metrics, point._replace(step=2), rollout) == {}
    assert by_step(metrics, point._replace(noise=point.x), rollout) == {}
