"""The order of conversations in batches of tokens: laws for any lengths, ranks and stops."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.chat_plan import PackedPlan, plan
from data_pipeline.errors import InputError
from data_pipeline.plan import Draw

LENGTHS = st.lists(st.integers(0, 120), min_size=4, max_size=40)


def drawn(order: PackedPlan, batches: int) -> list[Draw]:
    """What comes next in all ranks' batches, in the order of the samples."""
    return [draw for _ in range(batches) for part in order.advance() for draw in part]


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 3))
@example([0, 0, 0, 98], 1, 0)
@example([93, 8, 8, 8, 8], 4, 2)
def test_batches_are_full_and_never_too_full(lengths: list[int], world: int, seed: int) -> None:
    order = PackedPlan(lengths, 100, seed, 0, world)
    following = plan(len(lengths), 1, seed)
    counted = [max(1, length) for length in lengths]  # those that will be left out count as one
    for _ in range(12):
        parts = order.advance()
        batch = [draw for part in parts for draw in part]
        # What an epoch ends and the next begins with may be one conversation: twice only where a rank had none.
        firsts, others = {part[0].index for part in parts}, [draw.index for part in parts for draw in part[1:]]
        assert len({*firsts, *others}) == len(firsts) + len(others)
        assert all(len(part) == 1 or sum(counted[d.index] for d in part) <= 100 for part in parts)
        # The very samples that come next, each once.
        expected = [next(following).draws[0] for _ in batch]
        assert sorted(batch, key=str) == sorted(expected, key=str)
        ahead = order._next()
        if ahead.index not in {draw.index for draw in batch}:  # it had no room with any rank
            assert all(sum(counted[d.index] for d in part) + counted[ahead.index] > 100 for part in parts)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 3), st.integers(0, 9))
def test_a_run_goes_on_where_it_stood_on_other_ranks_and_with_other_tokens(
    lengths: list[int], world: int, batches: int
) -> None:
    whole = PackedPlan(lengths, 100, 0, 0, world)
    before = drawn(whole, batches)
    state = whole.state_dict()
    again = PackedPlan(lengths, 100, 0, 0, world)
    again.load_state_dict(state)
    assert again.state_dict() == state
    rest = drawn(whole, 4)
    assert drawn(again, 4) == rest
    other = PackedPlan(lengths, 250, 0, 0, 1)
    other.load_state_dict(state)
    plain = plan(len(lengths), 1, 0)
    skipped = [next(plain).draws[0] for _ in before]
    assert sorted(skipped, key=str) == sorted(before, key=str)
    assert other.advance()[0][0] == next(plain).draws[0]


def test_ranks_share_what_one_plan_says() -> None:
    lengths = [30, 70, 20, 90, 10, 60, 50, 40]
    ranks = [PackedPlan(lengths, 100, 0, rank, 2) for rank in range(2)]
    told = PackedPlan(lengths, 100, 0, 0, 2)
    for _ in range(6):
        assert [list(next(rank).draws) for rank in ranks] == told.advance()


def test_a_place_of_a_plan_by_numbers_is_one_of_tokens() -> None:
    plain = plan(10, 3, 0)
    for _ in range(2):
        next(plain)
    order = PackedPlan([10] * 10, 40, 0)
    order.load_state_dict(plain.state_dict())
    assert [draw.index for draw in next(order).draws] == [
        draw.index for draw in (*next(plain).draws, *next(plain).draws)
    ][:4]
    with pytest.raises(InputError, match="too few for 4 ranks"):
        PackedPlan([1, 2, 3], 10, 0, 0, 4)
