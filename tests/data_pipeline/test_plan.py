"""The order of batches: every sample once an epoch, any start, any number of ranks."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest

from data_pipeline.plan import Plan, interleave

SQUARE, WIDE = ((64, 64), (64, 64)), ((32, 64), (32, 64))
SETS = {
    ("edit", SQUARE): list(range(50)),
    ("edit", WIDE): list(range(50, 67)),
    ("text_to_image", SQUARE[:1]): list(range(67, 90)),
}
RATIO = {"edit": 2, "text_to_image": 1}


def first(plan: Plan, count: int, start: int = 0):
    return list(itertools.islice(plan.batches(start), count))


@pytest.mark.parametrize("start", [1, 2, 7, 100, 1001])
def test_starting_anywhere_gives_the_same_sequence(start: int) -> None:
    plan = Plan(SETS, RATIO, 4, seed=3)
    assert first(plan, start + 5)[start:] == first(Plan(SETS, RATIO, 4, seed=3), 5, start)


def test_every_sample_comes_once_an_epoch_of_its_set() -> None:
    seen: dict[tuple, Counter] = {}
    for batch in first(Plan(SETS, RATIO, 4, seed=0), 300):
        for index, epoch in zip(batch.indices, batch.epochs, strict=True):
            seen.setdefault((batch.task, batch.bucket, epoch), Counter())[index] += 1
    complete = [key for key in seen if (*key[:2], key[2] + 1) in seen]
    assert len(complete) > 5
    for task, bucket, epoch in complete:
        assert seen[task, bucket, epoch] == Counter(SETS[task, bucket])


def test_epochs_and_seeds_differ_in_order() -> None:
    sets = {("edit", SQUARE): list(range(40))}
    batches = first(Plan(sets, {"edit": 1}, 40, seed=0), 2) + first(Plan(sets, {"edit": 1}, 40, seed=1), 1)
    assert len({batch.indices for batch in batches}) == 3


def test_tasks_alternate_by_ratio_and_buckets_by_size() -> None:
    batches = first(Plan(SETS, RATIO, 4, seed=0), 3000)
    tasks = Counter(batch.task for batch in batches)
    assert tasks == {"edit": 2000, "text_to_image": 1000}
    assert [b.task for b in batches[:6]] == ["edit", "text_to_image", "edit"] * 2
    share = sum(b.bucket == WIDE for b in batches) / 2000
    assert share == pytest.approx(17 / 67, abs=0.002)


def test_a_batch_has_one_task_and_one_bucket() -> None:
    for batch in first(Plan(SETS, RATIO, 4, seed=0), 100):
        assert set(batch.indices) <= set(SETS[batch.task, batch.bucket])


def test_ranks_share_a_global_batch() -> None:
    whole = first(Plan(SETS, RATIO, 8, seed=5), 60)
    ranks = [first(Plan(SETS, RATIO, 4, seed=5, rank=r, world_size=2), 60) for r in range(2)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert (left.task, left.bucket) == (right.task, right.bucket) == (batch.task, batch.bucket)
        assert left.indices + right.indices == batch.indices


def test_a_late_start_costs_integer_arithmetic_only() -> None:
    plan = Plan(SETS, RATIO, 4, seed=0)
    started = time.perf_counter()
    first(plan, 1, start=1_000_000)
    assert time.perf_counter() - started < 20  # a replay of a million batches would take minutes


def test_interleaving_is_even() -> None:
    cycle = interleave({"a": 5, "b": 2})
    assert Counter(cycle) == {"a": 5, "b": 2}
    assert max(len(list(run)) for task, run in itertools.groupby(cycle) if task == "a") <= 3
