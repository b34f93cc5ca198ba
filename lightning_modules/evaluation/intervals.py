"""How far a measured figure may be off: from a few seeds, and from the items that were judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Interval(NamedTuple):
    """A figure and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of a few runs, mean +- t s / sqrt(n); that of one has no bounds."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half)


# Efron 1979; pairing as in Koehn 2004, "Statistical significance tests for machine translation evaluation".
def paired_bootstrap(
    values: Sequence[float], others: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean difference of two systems on the same items, which are drawn with replacement.

    >>> paired_bootstrap([1, 1, 0], [0, 0, 0])
    Interval(mean=0.6666666666666666, low=0.0, high=1.0)
    """
    difference = np.asarray(values, dtype=float) - np.asarray(others, dtype=float)
    n = len(difference)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile(counts @ difference / n, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))
