"""A keyed order of n things: a bijection, well mixed, the same for ever."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.permutation import HalfwisePermutation, KeyedPermutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 65537])
def test_every_thing_has_one_place(n: int) -> None:
    assert np.array_equal(np.sort(KeyedPermutation(n, b"key")(np.arange(n))), np.arange(n))


def test_places_may_be_asked_for_in_any_portions() -> None:
    permutation = KeyedPermutation(1000, b"key")
    whole = permutation(np.arange(1000))
    assert np.array_equal(np.concatenate([permutation(np.arange(i, i + 100)) for i in range(0, 1000, 100)]), whole)


def test_the_order_is_the_same_on_every_machine_and_for_ever() -> None:
    assert KeyedPermutation(10, b"golden")(np.arange(10)).tolist() == [3, 8, 0, 4, 1, 5, 9, 6, 7, 2]
    assert KeyedPermutation(10**12, b"golden")(np.arange(3)).tolist() == [886999497973, 581628820965, 847689429592]


def test_all_orders_of_four_come_equally_often() -> None:
    orders = Counter(tuple(KeyedPermutation(4, b"%d" % key)(np.arange(4)).tolist()) for key in range(12_000))
    assert len(orders) == 24
    chi_squared = sum((count - 500) ** 2 / 500 for count in orders.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, one in a thousand


def test_neighbours_do_not_stay_together() -> None:
    n = 10_000
    places = KeyedPermutation(n, b"key")(np.arange(n))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.04
    other = KeyedPermutation(n, b"other key")(np.arange(n))
    assert (places == other).sum() < 10


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_what_ends_an_epoch_does_not_begin_the_next(n: int) -> None:
    orders = [HalfwisePermutation(n, "key", epoch)(np.arange(n)).tolist() for epoch in range(20)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    for order, following in pairwise(orders):
        assert not set(order[n // 2 :]) & set(following[: n // 2])
    assert n < 10 or len({tuple(order) for order in orders}) == 20
