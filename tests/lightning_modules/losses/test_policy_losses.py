import math

import pytest
import torch

from lightning_modules.losses.forward_process import (
    contrast,
    diffusion_nft,
    matching_log_prob,
    optimality,
    velocity_divergence,
)
from lightning_modules.losses.policy_gradient import divergence_mask, gaussian_divergence, guarded_ratio, ppo_clip

T = torch.tensor


def test_ppo_clip_by_hand() -> None:
    ratio, advantages = T([1.0, 1.3, 1.3, 0.5, 0.5]), T([2.0, 2.0, -2.0, 2.0, -2.0])
    assert ppo_clip(ratio, advantages, 0.2).tolist() == pytest.approx([-2.0, -2.4, 2.6, -1.0, 1.6])


def test_divergence_mask_drops_only_what_moves_further_out() -> None:
    ratio, advantages = T([1.1, 0.9, 1.1, 0.9, 1.1]), T([1.0, 1.0, -1.0, -1.0, 1.0])
    divergence = T([2.0, 2.0, 2.0, 2.0, 0.5])
    assert divergence_mask(ratio, advantages, divergence, 1.0).tolist() == pytest.approx([0, -0.9, 1.1, 0, -1.1])
    assert divergence_mask(T([math.inf]), T([1.0]), T([2.0]), 1.0).item() == 0


def test_gaussian_divergence_and_guarded_ratio_by_hand() -> None:
    divergence = gaussian_divergence(T([[1.0, 3.0]]), T([[1.0, 1.0]]), 0.5)
    assert divergence.item() == pytest.approx((0 + 4) / 2 / (2 * 0.25))
    assert guarded_ratio(T([0.2]), T([0.3]), 0.5).item() == pytest.approx(math.exp(0.25))
    assert guarded_ratio(T([0.0]), T([0.0]), 0.5).item() == 1


def nft(v: torch.Tensor, old: torch.Tensor, r: float, beta: float) -> torch.Tensor:
    """At x = 1 and sigma = 0.5, where the velocity 1 denoises to x0 = 0.5 and the velocity 0 to 1."""
    positive, negative = (1 - 0.5 * each for each in contrast(v, old, beta))
    return diffusion_nft(positive, negative, T([[0.5]]), T([r]), beta)


def test_diffusion_nft_by_hand() -> None:
    v, old = T([[1.0]]), T([[0.0]])
    # v+ = 1 -> 0.5, error 0; v- = -1 -> 1.5, error 1, its square over its size 1.
    for r, wanted in ((1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
        assert nft(v, old, r, 1.0).item() == pytest.approx(wanted)
    # beta 0.5: v+ = 0.5 -> 0.75, 0.25^2 / 0.25; v- = -0.5 -> 1.25, 0.75^2 / 0.75; the whole over beta.
    assert nft(v, old, 0.5, 0.5).item() == pytest.approx((0.125 + 0.375) / 0.5)


def test_the_gradient_of_nft_points_to_good_pictures_and_away_from_bad_ones() -> None:
    old, signs = T([[0.0]]), []
    for r in (1.0, 0.5, 0.0):
        v = old.clone().requires_grad_()
        nft(v, old, r, 1.0).sum().backward()
        assert v.grad is not None
        signs.append(v.grad.item())
    assert signs[0] < 0 and signs[1] == pytest.approx(0) and signs[2] > 0  # descent raises v towards 1


def test_optimality_and_matching_log_probability_by_hand() -> None:
    assert optimality(T([-9.0, -5.0, 0.0, 2.5, 9.0]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1]
    found = matching_log_prob(T([[3.0]]), T([[1.0]]), T([0.5]))
    assert found.item() == pytest.approx(-((4 + 1e-10) ** 0.25 - 1e-10**0.25) * 0.5 / 0.25)


def test_velocity_divergence_has_a_gradient() -> None:
    v = T([[1.0, 2.0]], requires_grad=True)
    velocity_divergence(v, T([[0.0, 0.0]])).sum().backward()
    assert v.grad is not None and v.grad.tolist() == [[1.0, 2.0]]
