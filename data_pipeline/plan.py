"""Which samples come next: a pure function of how many samples of each stream were taken before.

A stream is a (set, bucket). Its samples come in one keyed permutation an epoch, the epochs end to end. The streams of a
set pass an epoch together: none begins the next while another has samples to give, and the last batch of a shape is
smaller, so that each sample of the set comes exactly once an epoch of the set. Less than a sample for each rank cannot
be shared out: it goes first in the next epoch. The state holds counts of samples, never of ranks, workers or steps: a
run goes on exactly where it stood whatever of these changed, and in other blends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.permutation import HalfwisePermutation

Bucket = tuple[tuple[int, int], ...]  # sizes (height, width) of the target and then of each reference
Stream = tuple[str, Bucket]  # a set's name and a bucket
PHASE_EPOCHS = 1 << 20  # more than any phase has, so that each draws anew
ORDER = 2  # version of the order: a place in another is not one in this


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
        batch_size: samples a rank takes of a bucket at a time, where there are as many.
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
        self._permutation = lru_cache(maxsize=4 * len(self.streams))(self._order)
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
        name = self.mixer.take(list(self._of_set))
        offered = self._offered(name)
        lead = self._next_bucket([stream for stream in offered if stream[0] == name], offered)
        alike = {stream: n for stream, n in offered.items() if stream[1][0] == lead[1][0]}
        return self._blended(lead, alike) if self.mixed else self._filled(lead, alike)

    def _filled(self, lead: Stream, alike: Mapping[Stream, int]) -> list[tuple[Stream, int]]:
        """A batch of one stream, filled up from those alike where that has too few."""
        size, portions = self._samples(lead), list[tuple[Stream, int]]()
        for stream in sorted(alike, key=lambda s: (s != lead, -alike[s] / self.streams[s])):
            room = min(size, self._samples(stream)) - sum(n for _, n in portions)
            if room > 0:
                size = min(size, self._samples(stream))
                portions.append((stream, min(room, alike[stream])))
        places = [(stream, self.cursors[stream] + i) for stream, n in portions for i in range(n)]
        places = places[: len(places) // self.world_size * self.world_size]
        for stream, _ in places:
            self.cursors[stream] += 1
        return places

    def _blended(self, lead: Stream, alike: dict[Stream, int]) -> list[tuple[Stream, int]]:
        """A batch of all sets that have a shape, in turn."""
        size = min(*map(self._samples, alike), sum(alike.values()) // self.world_size * self.world_size)
        places, stream = list[tuple[Stream, int]](), lead
        while True:
            places.append((stream, self.cursors[stream]))
            self.cursors[stream] += 1
            alike[stream] -= 1
            if len(places) == size:
                return places
            left = [s for s, n in alike.items() if n]
            name = self.mixer.take(list(dict.fromkeys(s[0] for s in left)))
            stream = self._next_bucket([s for s in left if s[0] == name], alike)

    def _offered(self, lead: str) -> dict[Stream, int]:
        """How many samples each stream has for a batch that a set leads, of shapes that have one for each rank.

        Within a set's epoch no sample can come twice. The last stream to end it goes on into the next, so that its
        batches stay full; so it is where fewer are left than ranks. What they are joined by is of the next epoch's
        first half, which holds none of them.
        """
        others = [name for name in self._of_set if name != lead] if self.mixed else []
        rest = {s: n for name in others for s, n in self._left(name, self._epoch(name)).items()}
        for epoch in count(self._epoch(lead)):
            own = self._left(lead, epoch)
            unfinished = [stream for stream, n in own.items() if n]
            if len(unfinished) == 1 and not self.mixed:
                own[unfinished[0]] += self.streams[unfinished[0]]
            left = rest | own
            for offered in ({s: min(n, self._distinct(s)) for s, n in left.items()}, left):
                shapes = Counter[tuple[int, int]]()
                for stream, n in offered.items():
                    shapes[stream[1][0]] += n
                found = {s: n for s, n in offered.items() if n and shapes[s[1][0]] >= self.world_size}
                if any(stream[0] == lead for stream in found):
                    return found
        raise AssertionError("unreachable")

    def _epoch(self, name: str) -> int:
        """The epoch that a set is in: that of its latest sample, or the next if no stream has any left."""
        streams = self._of_set[name]
        latest = max((self.cursors[s] - 1) // self.streams[s] for s in streams)
        return latest if any(self._left(name, latest).values()) else latest + 1

    def _left(self, name: str, epoch: int) -> dict[Stream, int]:
        """How many samples each stream of a set has to the end of an epoch."""
        return {s: (epoch + 1) * self.streams[s] - self.cursors[s] for s in self._of_set[name]}

    def _distinct(self, stream: Stream) -> int:
        """How many samples come next without any twice: those of the stream's epoch, and half the next if few."""
        size = self.streams[stream]
        left = size - self.cursors[stream] % size
        return left if left > size - size // 2 else left + size // 2

    def _next_bucket(self, streams: list[Stream], left: Mapping[Stream, int]) -> Stream:
        """The stream that has most of its epoch left when half its next batch is taken: large ones more often."""

        def remaining(stream: Stream) -> float:
            return (left[stream] - min(left[stream], self._samples(stream)) / 2) / self.streams[stream]

        return max(streams, key=remaining)

    def _samples(self, stream: Stream) -> int:
        """Samples of a full batch of all ranks."""
        return self.batch_size(stream[1]) * self.world_size

    def _draws(self, stream: Stream, places: list[int]) -> list[Draw]:
        """The samples at places of a stream."""
        epochs, within = np.divmod(np.asarray(places, dtype=np.int64), self.streams[stream])
        index = np.empty_like(within)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = self._permutation(stream, int(epoch))(within[epochs == epoch])
        return [Draw(stream, int(i), self.phase * PHASE_EPOCHS + int(e)) for i, e in zip(index, epochs, strict=True)]

    def _order(self, stream: Stream, epoch: int) -> HalfwisePermutation:
        return HalfwisePermutation(self.streams[stream], f"{self.seed}/{name_of(stream)}", epoch)

    def small(self) -> Iterator[str]:
        """What to warn of: shapes that do not fill a batch. A set with less than one sample a rank is refused."""
        for name, streams in self._of_set.items():
            if (total := sum(self.streams[s] for s in streams)) < self.world_size:
                raise InputError(
                    f"the set {name} has {total} samples for {self.world_size} ranks, which would all train on the "
                    "same; use fewer ranks, or add data"
                )
            shapes: dict[tuple[int, int], list[Stream]] = {}
            for stream in streams:
                shapes.setdefault(stream[1][0], []).append(stream)
            for (height, width), alike in shapes.items():
                found, size = sum(self.streams[s] for s in alike), min(map(self._samples, alike))
                if found < size:
                    late = (
                        f"batches are smaller: {found // self.world_size * self.world_size}"
                        if found >= self.world_size
                        else "they wait for epochs until each rank has one, and come with copies of themselves"
                    )
                    yield (
                        f"{name} {height}x{width}: {found} samples for batches of {size} on {self.world_size} ranks: "
                        f"{late}; take smaller batches, or a larger size_multiple, which makes fewer shapes"
                    )

    def state_dict(self) -> dict[str, Any]:
        """How many samples of each stream were taken, and each set's turns in this blend: plain data."""
        cursors = {name_of(stream): cursor for stream, cursor in self.cursors.items() if cursor}
        turns = {"ratio": self.mixer.ratio, "given": dict(self.mixer.given)}
        return {"order": ORDER, "seed": self.seed, "cursors": cursors, **turns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. In another blend turns are counted from here; a set that is left out keeps its place.

        Raises InputError for another seed or version of the order, whose permutations differ.
        """
        if state.get("order") != ORDER:
            raise InputError(
                f"the checkpoint's samples came in version {state.get('order', 1)} of the order, this code has "
                f"{ORDER}; resume with the code that wrote it, or start a new run from its export"
            )
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
