"""The flow-matching regression."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


# Conditional flow matching, Esser et al. 2024 (arXiv 2403.03206), equation 7.
def flow_matching(
    v: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."], weight: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Mean over samples of weight x mean squared error, each sample averaged over its own pixels first, in fp32."""
    squared = (v.float() - target.float()).square().flatten(1).mean(dim=1)
    return (weight * squared).mean()
