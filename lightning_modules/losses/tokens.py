"""Losses of a language model over the tokens that are learned."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Normalisation = Literal["token", "sample", "square"]
IGNORED = -100


def before_learned(labels: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    """Where a learned token comes next: a model's logits are wanted there, and nowhere else.

    >>> before_learned(torch.tensor([[IGNORED, 7, IGNORED], [IGNORED, 5, 6]])).tolist()
    [[True, False, False], [True, True, False]]
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def answer_nll(logits: Float[Tensor, "n v"], labels: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """-log p of each learned token given those before it, at the token's own place; 0 where nothing is learned.

    Args:
        logits: those of `before_learned`, row after row.
        labels: tokens, IGNORED where nothing is learned.
    """
    places = before_learned(labels).roll(1, dims=1)
    found = torch.nn.functional.cross_entropy(logits.float(), labels[places], reduction="none")
    return torch.zeros(labels.shape, dtype=found.dtype, device=logits.device).masked_scatter(places, found)


def token_weights(
    labels: Int[Tensor, "b l"], segments: Int[Tensor, "b l"], normalisation: Normalisation
) -> tuple[Float[Tensor, "b l"], Float[Tensor, ""]]:
    """What each learned token counts, all in all 1, and what they weigh together: n_i tokens of sample i n_i^(-p) each.

    "token" (p = 0): all tokens alike, so that long answers count more. "sample" (p = 1): all samples alike. "square"
    (p = 1/2): between them, as InternVL 2.5 (arXiv 2412.05271, section 3.3, equation 1).

    Args:
        labels: -100 where nothing is learned.
        segments: the number of a token's sample in its row, 0 where padded.
        normalisation: p.
    """
    learned = labels != IGNORED
    count = int(segments.max()) + 1
    sizes = torch.zeros(len(labels), count, dtype=torch.float32, device=labels.device)
    sizes.scatter_add_(1, segments, learned.float())
    power = {"token": 0.0, "sample": 1.0, "square": 0.5}[normalisation]
    weights = learned * sizes.clamp(min=1).gather(1, segments) ** -power
    total = weights.sum()
    return weights / total.clamp(min=torch.finfo(weights.dtype).tiny), total
