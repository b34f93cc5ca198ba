"""Which samples come next: a pure function of how many samples of each stream were taken before.

A stream is a (set, bucket). Its samples come in one keyed permutation an epoch, the epochs end to end, so that each
comes exactly once an epoch, and what does not fill a batch goes first in the next. The state holds counts of samples,
never of ranks, workers or steps: a run goes on exactly where it stood whatever of these changed, and in other blends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.permutation import KeyedPermutation

Bucket = tuple[tuple[int, int], ...]  # sizes (height, width) of the target and then of each reference
Stream = tuple[str, Bucket]  # a set's name and a bucket
PHASE_EPOCHS = 1 << 20  # more than any phase has, so that each draws anew


@dataclass(frozen=True)
class Draw:
    """One sample: its number in a stream, and the epoch of the stream that it belongs to."""

    stream: Stream
    index: int
    epoch: int


@dataclass(frozen=True)
class PlannedBatch:
    """What one rank trains on in one step; all targets have one shape. `phase` numbers the run's resolutions."""

    draws: tuple[Draw, ...]
    phase: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the targets."""
        return self.draws[0].stream[1][0]


class Mixer:
    """Takes turns in proportion to a ratio: next is the set that lacks most of its share.

    >>> mixer = Mixer({"edit": 2, "text_to_image": 1})
    >>> [mixer.take(["edit", "text_to_image"]) for _ in range(3)]
    ['edit', 'text_to_image', 'edit']
    """

    def __init__(self, ratio: Mapping[str, float]) -> None:
        self.ratio = {name: share for name, share in sorted(ratio.items()) if share > 0}
        self.given = dict.fromkeys(self.ratio, 0)

    def take(self, names: list[str]) -> str:
        """The next of these sets."""
        total, count = sum(self.ratio.values()), sum(self.given.values()) + 1
        name = max(names, key=lambda n: self.ratio[n] * count / total - self.given[n])
        self.given[name] += 1
        return name


class Plan:
    """The order of all batches.

    Args:
        streams: how many samples each stream has.
        ratio: batches of each set, relative to the others; samples where batches are mixed.
        batch_size: samples a rank takes of a bucket at a time.
        seed: of the permutations.
        rank, world_size: this process's part; all ranks take targets of one shape in the same step.
        mixed: batches hold samples of all sets that have a shape, instead of one set in turn.
        phase: number of the plan among those of a run, whose epochs are numbered on from PHASE_EPOCHS x phase.
    """

    def __init__(
        self,
        streams: Mapping[Stream, int],
        ratio: Mapping[str, float],
        batch_size: Callable[[Bucket], int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mixed: bool = False,
        phase: int = 0,
    ) -> None:
        self.mixer = Mixer(ratio)
        self.streams = {s: n for s, n in sorted(streams.items()) if n > 0}
        self.cursors = dict.fromkeys(self.streams, 0)
        self.batch_size, self.seed, self.mixed, self.phase = batch_size, seed, mixed, phase
        self.rank, self.world_size = rank, world_size
        self._of_set = {name: [s for s in self.streams if s[0] == name] for name in self.mixer.ratio}
        self._permutation = lru_cache(maxsize=4 * len(self.streams))(self._keyed_permutation)
        if missing := [name for name, found in self._of_set.items() if not found]:
            has = ", ".join(sorted({name for name, _ in streams})) or "none"
            raise InputError(
                f"the ratio asks for {', '.join(missing)}, but there are no training records of it (there are: {has}); "
                "add shards or set its ratio to 0"
            )

    def __next__(self) -> PlannedBatch:
        """This rank's part of the next batch."""
        mine = self.advance()[self.rank :: self.world_size]
        draws: list[Draw | None] = [None] * len(mine)
        for stream in dict(mine):
            slots = [i for i, (s, _) in enumerate(mine) if s == stream]
            for slot, draw in zip(slots, self._draws(stream, [mine[i][1] for i in slots]), strict=True):
                draws[slot] = draw
        return PlannedBatch(tuple(draw for draw in draws if draw is not None), self.phase)

    def advance(self) -> list[tuple[Stream, int]]:
        """Moves the cursors past the next batch of all ranks; returns each sample's stream and place in it."""
        lead = self._next_bucket(self._of_set[self.mixer.take(list(self._of_set))])
        if not self.mixed:
            return self._take(lead, self._samples(lead))
        alike = {name: [s for s in found if s[1][0] == lead[1][0]] for name, found in self._of_set.items()}
        alike = {name: found for name, found in alike.items() if found}
        size = min(self._samples(s) for found in alike.values() for s in found)
        places = self._take(lead, 1)
        while len(places) < size:
            places += self._take(self._next_bucket(alike[self.mixer.take(list(alike))]), 1)
        return places

    def _take(self, stream: Stream, count: int) -> list[tuple[Stream, int]]:
        first = self.cursors[stream]
        self.cursors[stream] += count
        return [(stream, place) for place in range(first, first + count)]

    def _next_bucket(self, streams: list[Stream]) -> Stream:
        """The stream that is least far in its epochs when half its next batch is taken: large ones more often."""

        def progress(stream: Stream) -> float:
            return (self.cursors[stream] + self._samples(stream) / 2) / self.streams[stream]

        return min(streams, key=progress)

    def _samples(self, stream: Stream) -> int:
        """Samples of a batch of all ranks."""
        return self.batch_size(stream[1]) * self.world_size

    def _draws(self, stream: Stream, places: list[int]) -> list[Draw]:
        """The samples at places of a stream."""
        epochs, within = np.divmod(np.asarray(places, dtype=np.int64), self.streams[stream])
        index = np.empty_like(within)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = self._permutation(stream, int(epoch))(within[epochs == epoch])
        return [Draw(stream, int(i), self.phase * PHASE_EPOCHS + int(e)) for i, e in zip(index, epochs, strict=True)]

    def _keyed_permutation(self, stream: Stream, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(self.streams[stream], f"{self.seed}/{name_of(stream)}/{epoch}".encode())

    def small(self) -> Iterator[str]:
        """What to warn of: streams that do not fill a batch. A set with less than one sample a rank is refused."""
        for name, streams in self._of_set.items():
            if (total := sum(self.streams[s] for s in streams)) < self.world_size:
                raise InputError(
                    f"the set {name} has {total} samples for {self.world_size} ranks, which would all train on the "
                    "same; use fewer ranks, or add data"
                )
            for stream in streams:
                if self.streams[stream] < (size := self._samples(stream)):
                    yield (
                        f"{name_of(stream)}: {self.streams[stream]} samples for batches of {size}: each is in a batch "
                        "more than once; take smaller batches, or a larger size_multiple, which makes fewer buckets"
                    )

    def state_dict(self) -> dict[str, Any]:
        """How many samples of each stream were taken, and each set's turns in this blend: plain data."""
        cursors = {name_of(stream): cursor for stream, cursor in self.cursors.items() if cursor}
        return {"seed": self.seed, "cursors": cursors, "ratio": self.mixer.ratio, "given": dict(self.mixer.given)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. In another blend turns are counted from here; a set that is left out keeps its place.

        Raises InputError for another seed, whose permutations differ.
        """
        if state["seed"] != self.seed:
            raise InputError(
                f"the checkpoint's order has the seed {state['seed']}, this run's data has {self.seed}; resume with "
                "the same seed, or start a new run"
            )
        names = {name_of(stream): stream for stream in self.streams}
        self.cursors = dict.fromkeys(self.streams, 0)
        self.cursors |= {names[name]: cursor for name, cursor in state["cursors"].items() if name in names}
        if state["ratio"] == self.mixer.ratio:
            self.mixer.given = dict(state["given"])


def name_of(stream: Stream) -> str:
    """ "edit 64x64+64x64": set, target and references."""
    return f"{stream[0]} {'+'.join(f'{height}x{width}' for height, width in stream[1])}"
