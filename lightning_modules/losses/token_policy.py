"""Log-probabilities of tokens, divergences of token policies, and how losses of tokens become one number.

A mask is 1 for tokens that a loss is about, 0 elsewhere; what stands there is never used.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tokens = Float[Tensor, "b t"]
Aggregate = Literal["token", "sequence", "constant"]
Estimator = Literal["k1", "k2", "k3"]
TOKENS = 256  # whose distributions are in memory at a time


def log_probs(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"], temperature: float = 1.0) -> Tokens:
    """log softmax(logits / temperature) at the tokens: under the distribution that they were drawn from."""
    scaled = logits.float() / temperature
    return scaled.gather(2, tokens[..., None])[..., 0] - scaled.logsumexp(dim=2)


def entropy(logits: Float[Tensor, "b t v"]) -> Tokens:
    """Of each token's distribution, in nats; few tokens at a time, because a vocabulary's logits are large."""
    found = []
    for some in logits.split(TOKENS, dim=1):
        logs = some.float().log_softmax(dim=2)
        found.append(-(logs.exp() * logs).sum(dim=2))
    return torch.cat(found, dim=1)


# Schulman 2020, "Approximating KL divergence"; GRPO (arXiv 2402.03300), equation 4, has k3.
def divergence(new: Tokens, reference: Tokens, estimator: Estimator) -> Tokens:
    """Estimates of KL(new || reference) at tokens drawn from `new`, log r = log reference - log new.

    k1 = -log r (no bias, may be negative), k2 = (log r)^2 / 2, k3 = r - 1 - log r.
    """
    log_ratio = reference - new
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


# "sequence": GRPO (arXiv 2402.03300), equation 3. "token": DAPO (arXiv 2503.14476), equation 8. "constant": Dr. GRPO
# (arXiv 2503.20783), section 3.2, whose length does not depend on the answers.
def aggregated(
    losses: Tokens, mask: Tokens, kind: Aggregate, total: float, sequences: float, longest: int
) -> Float[Tensor, ""]:
    """One number of a part of a batch, so that the parts' numbers add up to the batch's.

    Args:
        losses: of tokens.
        mask: of tokens.
        kind: "token": the mean over all tokens; "sequence": the mean over sequences of their means over tokens;
            "constant": the sum over tokens, divided by sequences times the longest answer allowed.
        total: tokens of the whole batch.
        sequences: of the whole batch.
        longest: tokens that an answer may have.
    """
    masked = torch.where(mask > 0, losses, 0.0)
    if kind == "token":
        return masked.sum() / max(total, 1.0)
    if kind == "sequence":
        return (masked.sum(dim=1) / mask.sum(dim=1).clamp_min(1)).sum() / max(sequences, 1.0)
    return masked.sum() / (max(sequences, 1.0) * longest)
