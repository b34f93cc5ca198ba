"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) in velocity."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def guide(negative: Float[Tensor, "b ..."], positive: Float[Tensor, "b ..."], scale: float) -> Float[Tensor, "b ..."]:
    """v = v_neg + s (v_pos - v_neg); s = 1 is the positive branch."""
    return negative + scale * (positive - negative)
