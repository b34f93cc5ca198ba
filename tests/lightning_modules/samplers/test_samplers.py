"""Laws of the path, the schedules, Euler's method and guidance."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import TypeCheckError

from lightning_modules.losses.flow_matching import flow_matching
from lightning_modules.samplers import path
from lightning_modules.samplers.guidance import guide
from lightning_modules.samplers.ode import euler
from lightning_modules.samplers.timesteps import logit_normal, schedule, shift


def pair(batch: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch and width are equal: where (B,) broadcasts along the wrong axis, nothing raises."""
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 3, 8, width, generator=g),
        torch.randn(batch, 3, 8, width, generator=g),
        torch.rand(batch, generator=g),
    )


def test_conversions_are_inverses() -> None:
    x0, noise, sigma = pair()
    x, v = path.interpolate(x0, noise, sigma), path.velocity(x0, noise)
    torch.testing.assert_close(path.denoise(x, v, sigma), x0)
    torch.testing.assert_close(path.renoise(x, v, sigma), noise)


def test_each_sample_has_its_own_sigma() -> None:
    x0, noise, sigma = pair()
    whole = path.interpolate(x0, noise, sigma)
    for i in range(8):
        torch.testing.assert_close(whole[i], (1 - sigma[i]) * x0[i] + sigma[i] * noise[i])


def test_ends_of_the_path() -> None:
    x0, noise, _ = pair()
    assert torch.equal(path.interpolate(x0, noise, torch.ones(8)), noise)
    assert torch.equal(path.interpolate(x0, noise, torch.zeros(8)), x0)
    with pytest.raises(TypeCheckError):  # one sigma for eight samples would broadcast, and be silently wrong
        path.interpolate(x0, noise, torch.ones(1))
    with pytest.raises(ValueError, match=r"must have shape \(8,\)"):  # and so where annotations are not enforced
        inspect.unwrap(path.per_sample)(torch.ones(1), x0)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_the_schedule_is_diffusers(steps: int, factor: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(schedule(steps, factor), scheduler.sigmas, atol=1e-6, rtol=1e-6)


def test_logit_normal_has_its_quantiles() -> None:
    u = torch.tensor([0.5, 0.8413447])
    torch.testing.assert_close(logit_normal(u, 0.3, 2.0), torch.sigmoid(torch.tensor([0.3, 2.3])), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(logit_normal(torch.tensor([0.0, 1.0]))).all()


def test_shift_fixes_the_ends_and_moves_the_middle() -> None:
    sigma = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift(sigma, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(shift(shift(sigma, 3.0), 1 / 3), sigma)


def test_euler_is_exact_on_straight_paths() -> None:
    x0, noise, _ = pair()
    for steps in (1, 5):
        torch.testing.assert_close(euler(lambda x, s: noise - x0, noise, schedule(steps)), x0, atol=1e-5, rtol=1e-5)


def test_euler_converges_with_order_one_on_a_gaussian() -> None:
    # Data N(0, d^2): E[v | x] = x (sigma - (1 - sigma) d^2) / ((1 - sigma)^2 d^2 + sigma^2), and x(0) = d x(1).
    d = 0.5

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = path.per_sample(sigma, x)
        return x * (s - (1 - s) * d**2) / ((1 - s) ** 2 * d**2 + s**2)

    start = torch.ones(1, 1)
    sizes = [40, 80, 160]
    errors = [abs(euler(velocity, start, torch.linspace(1, 0, n + 1)).item() - d) for n in sizes]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1.0, 1.0], abs=0.1)


def test_guidance_extrapolates() -> None:
    negative, positive = torch.tensor([1.0]), torch.tensor([2.0])
    assert guide(negative, positive, 1.0) == positive and guide(negative, positive, 3.5) == 4.5


def test_the_loss_weighs_samples_not_pixels() -> None:
    v, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    assert flow_matching(v, target, torch.tensor([1.0, 0.5])).item() == pytest.approx((1 + 0.5 * 9) / 2)
