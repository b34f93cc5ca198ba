"""Intervals against tables, hand computation, and how often they hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_modules.evaluation.intervals import Interval, paired_bootstrap, t_interval


def test_students_interval_equals_the_tables() -> None:
    # t(0.975) is 12.706, 4.303 and 2.262 at 1, 2 and 9 degrees of freedom.
    assert t_interval([0.0, 2.0]) == pytest.approx((1.0, 1 - 12.7062, 1 + 12.7062), abs=1e-4)
    assert t_interval([0.80, 0.82, 0.87]) == pytest.approx((0.83, 0.83 - 0.08956, 0.83 + 0.08956), abs=1e-4)
    found = t_interval(list(range(10)))
    assert found.high - found.mean == pytest.approx(2.26216 * np.std(range(10), ddof=1) / 10**0.5, rel=1e-5)


def test_one_run_tells_nothing_of_the_spread() -> None:
    assert t_interval([0.7]) == Interval(0.7, -math.inf, math.inf)


def test_the_bootstrap_of_few_items_is_exact() -> None:
    # Two items, differences 1 and 0: the mean is 0, 1/2 or 1 with chances 1/4, 1/2 and 1/4.
    assert paired_bootstrap([1, 0], [0, 0]) == (0.5, 0.0, 1.0)
    assert paired_bootstrap([1, 0], [0, 0], level=0.4) == (0.5, 0.5, 0.5)
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0.0, 0.0, 0.0)


def test_pairing_removes_what_the_items_share() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(400)
    found = paired_bootstrap(easy + 0.01, easy)
    assert found == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(ValueError):
        paired_bootstrap(easy, easy[:10])


def test_large_samples_agree_with_the_normal_interval_and_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.3, 1, 1000)
    found = paired_bootstrap(values, np.zeros(1000))
    half = 1.96 * values.std() / 1000**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)
    inside = 0
    for _ in range(200):
        interval = paired_bootstrap(rng.normal(0.3, 1, 60), np.zeros(60), resamples=400)
        inside += interval.low <= 0.3 <= interval.high
    assert 180 <= inside <= 199
