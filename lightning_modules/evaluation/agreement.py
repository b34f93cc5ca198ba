"""How well predicted scores agree with a judge's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

ROWS = 1024  # of all pairs at a time

Scores = Float[Tensor, " n"]


def pairwise_accuracy(predicted: Scores, judged: Scores, groups: Sequence[str] | None = None) -> float:
    """Share of the pairs that the judge scores differently which are predicted in its order; a tie counts half.

    With `groups` only pairs of one group count: what reinforcement learning compares. NaN where there is no pair.
    """
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups or ()))}
    owner = torch.tensor([numbers[group] for group in groups]) if groups else torch.zeros(len(judged))
    right = pairs = 0.0
    for rows in torch.arange(len(judged)).split(ROWS):
        better = (judged[rows, None] > judged) & (owner[rows, None] == owner)
        difference = predicted[rows, None] - predicted
        right += ((difference > 0).double() + 0.5 * (difference == 0).double())[better].sum().item()
        pairs += better.sum().item()
    return right / pairs if pairs else float("nan")


def agreement(predicted: Scores, judged: Scores, groups: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and the accuracy of comparisons of all pairs and of pairs of one group.

    Where the judge gives many equal scores, Spearman's stays below 1 for any prediction that has no ties; the accuracy
    of comparisons does not.
    """
    return {
        "pearson": float(pearson_corrcoef(predicted, judged)),
        "spearman": float(spearman_corrcoef(predicted, judged)),
        "pairwise": pairwise_accuracy(predicted, judged),
        "pairwise_in_group": pairwise_accuracy(predicted, judged, groups),
    }
