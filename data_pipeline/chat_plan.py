"""The order of conversations: so many a batch, or so many tokens, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.plan import Bucket, Draw, Plan, PlannedBatch

SET = "reasoning"
BUCKET: Bucket = ((0, 0),)  # conversations have no shape: all are of one bucket


def plan(count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Plan:
    """A keyed permutation an epoch, `batch_size` conversations a rank and batch."""
    return Plan({(SET, BUCKET): count}, {SET: 1}, lambda bucket: batch_size, seed, rank, world_size)


class PackedPlan:
    """The same order, as many conversations a rank and batch as have a number of tokens together.

    A batch takes conversations in their order, each for the rank that has most room, until one comes that no rank has
    room for: it begins the next batch, and so does one that is in it already, from the epoch before. So all ranks have
    some, none has more than its tokens, unless one conversation alone does, and the state is the place in the order, as
    of a plan by numbers.

    Args:
        lengths: tokens of each conversation.
        tokens: of a batch and rank, at most.
        seed: of the order.
        rank, world_size: this process's part.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if len(lengths) < world_size:
            raise InputError(f"{len(lengths)} conversations are too few for {world_size} ranks; use fewer, or add data")
        self.lengths, self.tokens, self.rank, self.world_size = lengths, tokens, rank, world_size
        self._order = plan(len(lengths), 1, seed)
        self._ahead: Draw | None = None  # the one that comes next, drawn and not taken

    def __next__(self) -> PlannedBatch:
        """This rank's part of the next batch."""
        return PlannedBatch(tuple(self.advance()[self.rank]))

    def advance(self) -> list[list[Draw]]:
        """Moves past the next batch; returns each rank's part of it."""
        parts: list[list[Draw]] = [[] for _ in range(self.world_size)]
        room = [self.tokens] * self.world_size
        taken = set[int]()
        while True:
            draw = self._next()
            length = max(1, self.lengths[draw.index])  # what will be left out must not come without end
            empty = [rank for rank, part in enumerate(parts) if not part]
            place = empty[0] if empty else max(range(self.world_size), key=lambda rank: room[rank])
            if not empty and (length > room[place] or draw.index in taken):
                return parts
            parts[place].append(draw)
            room[place] -= length
            taken.add(draw.index)
            self._ahead = None

    def _next(self) -> Draw:
        if self._ahead is None:
            self._ahead = next(self._order).draws[0]
        return self._ahead

    def state_dict(self) -> dict[str, Any]:
        """How many conversations were taken: plain data, as of a plan by numbers."""
        state = self._order.state_dict()
        ahead = int(self._ahead is not None)
        given = {name: turns - ahead for name, turns in state["given"].items()}
        cursors = {name: cursor - ahead for name, cursor in state["cursors"].items()}
        return {**state, "cursors": {name: cursor for name, cursor in cursors.items() if cursor}, "given": given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, of a plan by numbers too."""
        self._order.load_state_dict(state)
        self._ahead = None
