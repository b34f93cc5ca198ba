"""Losses of tokens and of preferences against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from lightning_modules.losses import preference, token_policy
from lightning_modules.losses.policy_gradient import clip_higher, dual_clip


def test_log_probs_are_of_the_distribution_that_was_drawn_from() -> None:
    logits = tensor([[[0.0, math.log(3.0)], [2.0, 2.0]]])
    found = token_policy.log_probs(logits, tensor([[1, 0]]))
    torch.testing.assert_close(found, tensor([[math.log(0.75), math.log(0.5)]]))
    halved = token_policy.log_probs(logits, tensor([[1, 0]]), temperature=0.5)  # 3 to 1 becomes 9 to 1
    torch.testing.assert_close(halved, tensor([[math.log(0.9), math.log(0.5)]]))
    torch.testing.assert_close(token_policy.entropy(logits)[0, 1], tensor(math.log(2.0)))


def test_the_upper_limit_is_its_own() -> None:
    ratio, ones = tensor([[0.7, 1.25, 1.3]]), torch.ones(1, 3)
    torch.testing.assert_close(clip_higher(ratio, ones, 0.2, 0.28), -tensor([[0.7, 1.25, 1.28]]))
    torch.testing.assert_close(clip_higher(ratio, -ones, 0.2, 0.28), tensor([[0.8, 1.25, 1.3]]))


def test_dual_clip_bounds_what_a_negative_advantage_pushes() -> None:
    ratio, advantages = tensor([[10.0, 10.0]]), tensor([[-2.0, 2.0]])
    loss = clip_higher(ratio, advantages, 0.2, 0.28)
    torch.testing.assert_close(dual_clip(loss, advantages, 3.0), tensor([[6.0, -2.56]]))


def test_divergences_estimate_the_kullback_leibler_divergence() -> None:
    new, reference = tensor([0.6, 0.4]).log(), tensor([0.5, 0.5]).log()
    exact = (new.exp() * (new - reference)).sum()
    for kind in ("k1", "k3"):  # unbiased: their mean under the policy is the divergence
        each = token_policy.divergence(new[:, None], reference[:, None], kind)[:, 0]
        torch.testing.assert_close((new.exp() * each).sum(), exact)
    k2 = token_policy.divergence(new[:, None], reference[:, None], "k2")[:, 0]
    torch.testing.assert_close(k2, tensor([math.log(1.2) ** 2 / 2, math.log(0.8) ** 2 / 2]))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("token", (1 + 2 + 3 + 10) / 4), ("sequence", (2 + 10) / 2), ("constant", (1 + 2 + 3 + 10) / (2 * 5))],
)
def test_parts_of_a_batch_add_up(kind: str, wanted: float) -> None:
    losses, mask = tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf]]), tensor([[1.0, 1, 1], [1, 0, 0]])
    whole = token_policy.aggregated(losses, mask, kind, 4.0, 2.0, 5)
    parts = [token_policy.aggregated(losses[i : i + 1], mask[i : i + 1], kind, 4.0, 2.0, 5) for i in range(2)]
    torch.testing.assert_close(whole, tensor(wanted))
    torch.testing.assert_close(sum(parts), tensor(wanted))


def test_preferences_by_hand() -> None:
    chosen, rejected = tensor([2.0]), tensor([-1.0])
    torch.testing.assert_close(preference.dpo(chosen, rejected, 0.1), tensor([math.log(1 + math.exp(-0.3))]))
    good = preference.bco(chosen, tensor([1.0]), 0.1, 0.05)
    bad = preference.bco(rejected, tensor([0.0]), 0.1, 0.05)
    torch.testing.assert_close(good, tensor([math.log(1 + math.exp(-0.15))]))
    torch.testing.assert_close(bad, tensor([math.log(1 + math.exp(-0.15))]))
    nll = preference.likelihood(tensor([-6.0]), tensor([3.0]))
    torch.testing.assert_close(nll, tensor([2.0]))
    mixed = preference.mixed_preference(tensor([1.0]), tensor([2.0]), nll, (0.8, 0.2, 1.0))
    torch.testing.assert_close(mixed, tensor([3.2]))
