from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.losses.tokens import answer_nll, before_learned, token_weights

LABELS = torch.tensor([[-100, 3, 4, 5, 6, -100, 7, -100]])  # four learned tokens of the first sample, one of the second
SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0]])


@pytest.mark.parametrize(
    ("normalisation", "first", "second", "total"),
    [("token", 1 / 5, 1 / 5, 5), ("sample", 1 / 8, 1 / 2, 2), ("square", 1 / 6, 1 / 3, 3)],
)
def test_weights_by_hand(normalisation: str, first: float, second: float, total: float) -> None:
    weights, found = token_weights(LABELS, SEGMENTS, normalisation)
    assert found.item() == total
    expected = torch.tensor([[0, first, first, first, first, 0, second, 0]])
    assert torch.allclose(weights, expected)


def test_a_row_in_which_nothing_is_learned_weighs_nothing() -> None:
    labels = torch.full((1, 4), -100)
    weights, total = token_weights(labels, torch.ones_like(labels), "sample")
    assert weights.sum() == 0 and total == 0


def test_likelihood_is_that_of_the_next_token() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = math.log(3)  # 3 of 6
    labels = torch.tensor([[-100, 2, 1], [-100, -100, 3]])
    places = before_learned(labels)
    assert places.tolist() == [[True, True, False], [False, True, False]]
    nll = answer_nll(logits[places], labels)
    assert torch.allclose(nll, torch.tensor([[0.0, math.log(2), math.log(4)], [0.0, 0.0, math.log(4)]]))
