"""Losses of preferences between two answers to one question, one value a pair or an answer.

All work on sums over tokens of log-probabilities, under the policy less under a reference: the implicit reward of an
answer is beta times that difference.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

Answers = Float[Tensor, " b"]


# DPO, Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
def dpo(chosen: Answers, rejected: Answers, beta: float) -> Answers:
    """-log sigmoid(beta (chosen - rejected)) of pairs of log-ratios."""
    return -logsigmoid(beta * (chosen - rejected))


# BCO, Jung et al. 2024 (arXiv 2404.04656), equation 11, as MPO (arXiv 2411.10442), equations 5 and 6, has it.
def bco(log_ratios: Answers, desirable: Answers, beta: float, shift: float) -> Answers:
    """-log sigmoid(beta x - shift) of answers that are desirable (1), -log sigmoid(-(beta x - shift)) of others (0);
    `shift` is a moving average of beta x over both kinds."""
    sign = 2 * desirable - 1
    return -logsigmoid(sign * (beta * log_ratios - shift))


# MPO (arXiv 2411.10442), equation 7.
def likelihood(chosen: Answers, lengths: Answers) -> Answers:
    """-log p / |y|: of the chosen answers, a token."""
    return -chosen / lengths


# R1V2 (arXiv 2504.16656), mixed preference objective; MPO (arXiv 2411.10442), equation 2.
def mixed_preference(
    preference: Answers, quality: Answers, generation: Answers, weights: tuple[float, float, float]
) -> Answers:
    """w1 DPO + w2 BCO + w3 NLL of pairs."""
    return weights[0] * preference + weights[1] * quality + weights[2] * generation
