import math

import pytest
import torch

from lightning_modules.evaluation import agreement as module
from lightning_modules.evaluation.agreement import agreement, pairwise_accuracy

JUDGED = torch.tensor([0.0, 0.5, 0.5, 1.0])


def test_comparisons_by_hand() -> None:
    # five pairs differ: (1,0) (2,0) (3,0) (3,1) (3,2)
    assert pairwise_accuracy(JUDGED, JUDGED) == 1
    assert pairwise_accuracy(-JUDGED, JUDGED) == 0
    assert pairwise_accuracy(torch.zeros(4), JUDGED) == 0.5
    assert pairwise_accuracy(torch.tensor([0.3, 0.1, 0.4, 0.4]), JUDGED) == pytest.approx((0 + 1 + 1 + 1 + 0.5) / 5)
    groups = ["a", "b", "a", "b"]  # of one group: (2,0) (3,1)
    assert pairwise_accuracy(torch.tensor([0.3, 0.5, 0.2, 0.6]), JUDGED, groups) == 0.5
    assert math.isnan(pairwise_accuracy(JUDGED, torch.ones(4)))


def test_portions_of_the_pairs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, judged = (torch.rand(50, generator=generator).mul(8).round() for _ in range(2))
    groups = [str(i % 7) for i in range(50)]
    whole = agreement(predicted, judged, groups)
    monkeypatch.setattr(module, "ROWS", 3)
    assert agreement(predicted, judged, groups) == whole


def test_correlations_are_scale_free_and_spearmans_sees_ranks_alone() -> None:
    judged = torch.linspace(0, 1, 9)
    found = agreement(torch.exp(5 * judged), judged, ["one"] * 9)
    assert found["spearman"] == pytest.approx(1) and 0.7 < found["pearson"] < 0.95
    assert found["pairwise"] == found["pairwise_in_group"] == 1
    assert agreement(3 - 2 * judged, judged, ["one"] * 9)["pearson"] == pytest.approx(-1)
