"""Which samples come next: a pure function of the sets, the seed and the number of the batch.

A set is a (task, bucket); its stream is the concatenation of one keyed permutation an epoch, so that every sample comes
exactly once an epoch of its set, and what does not fill a batch goes first in the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Bucket = tuple[tuple[int, int], ...]  # sizes (height, width) of the target and then of each reference


@dataclass(frozen=True)
class PlannedBatch:
    """Samples of one set: their positions in the index and the epoch of the set that each belongs to."""

    task: str
    bucket: Bucket
    indices: tuple[int, ...]
    epochs: tuple[int, ...]


class Plan:
    """The order of all batches.

    Args:
        sets: positions in the index by (task, bucket).
        ratio: batches of each task in a cycle, for example {"edit": 2, "text_to_image": 1}.
        batch_size: samples a rank takes of each batch.
        seed: of the permutations.
        rank, world_size: this process's part; all ranks get the same set in the same step.
    """

    def __init__(
        self,
        sets: Mapping[tuple[str, Bucket], Sequence[int]],
        ratio: Mapping[str, int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sets = {key: np.asarray(sets[key], dtype=np.int64) for key in sorted(sets) if len(sets[key])}
        self.cycle = interleave({task: n for task, n in sorted(ratio.items()) if n > 0})
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._permutation = lru_cache(maxsize=4 * len(self.sets))(self._keyed_permutation)

    def batches(self, start: int = 0) -> Iterator[PlannedBatch]:
        """Batches from number `start` on, without end."""
        rounds, position = divmod(start, len(self.cycle))
        done = {task: rounds * self.cycle.count(task) + self.cycle[:position].count(task) for task in self.cycle}
        choices = {task: BucketChoice([(b, len(i)) for (t, b), i in self.sets.items() if t == task]) for task in done}
        cursors = {task: choices[task].counts(done[task]) for task in done}
        number = start
        while True:
            task = self.cycle[number % len(self.cycle)]
            bucket = choices[task](done[task])
            yield self._batch(task, bucket, cursors[task][bucket])
            cursors[task][bucket] += 1
            done[task] += 1
            number += 1

    def _batch(self, task: str, bucket: Bucket, cursor: int) -> PlannedBatch:
        """The `cursor`-th batch of a set."""
        samples = self.sets[task, bucket]
        first = (cursor * self.world_size + self.rank) * self.batch_size
        positions = [divmod(p, len(samples)) for p in range(first, first + self.batch_size)]
        indices = tuple(int(samples[self._permutation(task, bucket, epoch)[i]]) for epoch, i in positions)
        return PlannedBatch(task, bucket, indices, tuple(epoch for epoch, _ in positions))

    def _keyed_permutation(self, task: str, bucket: Bucket, epoch: int) -> np.ndarray:
        name = f"{self.seed}/{task}/{bucket}/{epoch}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key)).permutation(len(self.sets[task, bucket]))


def interleave(ratio: Mapping[str, int]) -> list[str]:
    """One cycle of tasks, each as evenly spread as its share allows.

    >>> interleave({"edit": 2, "text_to_image": 1})
    ['edit', 'text_to_image', 'edit']
    """
    total, given = sum(ratio.values()), dict.fromkeys(ratio, 0)
    cycle: list[str] = []
    for i in range(1, total + 1):
        task = max(ratio, key=lambda t: ratio[t] * i / total - given[t])
        given[task] += 1
        cycle.append(task)
    return cycle


class BucketChoice:
    """The bucket of a task's k-th batch: the additive recurrence k x golden ratio over shares proportional to sizes."""

    def __init__(self, sizes: Sequence[tuple[Bucket, int]]) -> None:
        self.buckets = [bucket for bucket, _ in sizes]
        self.edges = np.cumsum([n for _, n in sizes]) / max(1, sum(n for _, n in sizes))

    def _indices(self, k: np.ndarray) -> np.ndarray:
        points = (k * 0.6180339887498949 + 0.5) % 1.0
        return np.minimum(np.searchsorted(self.edges, points, side="right"), len(self.buckets) - 1)

    def __call__(self, k: int) -> Bucket:
        return self.buckets[int(self._indices(np.array([k]))[0])]

    def counts(self, k: int) -> dict[Bucket, int]:
        """How often each bucket was chosen before the k-th batch."""
        counts = np.bincount(self._indices(np.arange(k)), minlength=len(self.buckets))
        return dict(zip(self.buckets, counts.tolist(), strict=True))
