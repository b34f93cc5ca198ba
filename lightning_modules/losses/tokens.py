"""Losses of a language model over the tokens that are learned."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Normalisation = Literal["token", "sample", "square"]
IGNORED = -100


def learned_columns(labels: Int[Tensor, "b l"]) -> Int[Tensor, " k"]:
    """Places at which a row learns a token: a model's logits are wanted one place before each, and nowhere else.

    >>> learned_columns(torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [IGNORED, IGNORED, 5, 6]])).tolist()
    [2, 3]
    """
    return (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0] + 1


def answer_nll(logits: Float[Tensor, "b k v"], labels: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """-log p of each learned token given those before it; 0 where nothing is learned.

    Args:
        logits: those of the place before each token.
        labels: tokens, IGNORED where nothing is learned.
    """
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)


def token_weights(
    labels: Int[Tensor, "b l"], segments: Int[Tensor, "b l"], normalisation: Normalisation
) -> Float[Tensor, "b l"]:
    """What each learned token counts, all in all 1: n_i tokens of sample i weigh in proportion to n_i^(-p) each.

    "token" (p = 0): all tokens alike, so that long answers count more. "sample" (p = 1): all samples alike. "square"
    (p = 1/2): between them, as InternVL 2.5 (arXiv 2412.05271, section 3.3, equation 1).

    Args:
        labels: -100 where nothing is learned.
        segments: the number of a token's sample in its row, 0 where padded.
        normalisation: p.
    """
    learned = labels != IGNORED
    count = int(segments.max()) + 1
    sizes = torch.zeros(len(labels), count, device=labels.device).scatter_add_(1, segments, learned.float())
    power = {"token": 0.0, "sample": 1.0, "square": 0.5}[normalisation]
    weights = learned * sizes.clamp(min=1).gather(1, segments) ** -power
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
