"""The order of batches: every sample once an epoch of its set, wherever and however often a run is resumed."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter, defaultdict

import pytest

from data_pipeline.errors import InputError
from data_pipeline.plan import PHASE_EPOCHS, Bucket, Mixer, Plan, PlannedBatch, Stream, name_of

SQUARE, WIDE = (64, 64), (32, 64)
STREAMS: dict[Stream, int] = {
    ("edit", (SQUARE, SQUARE)): 50,
    ("edit", (WIDE, WIDE)): 17,
    ("multi_reference", (SQUARE, SQUARE, WIDE)): 9,
    ("text_to_image", (SQUARE,)): 23,
    ("text_to_image", (WIDE,)): 3,
}
RATIO = {"edit": 2, "text_to_image": 1}


def plan(size: int = 4, ratio: dict[str, float] = RATIO, seed: int = 0, **options) -> Plan:
    return Plan(STREAMS, ratio, lambda bucket: size, seed, **options)


def first(made: Plan, count: int) -> list[PlannedBatch]:
    return [next(made) for _ in range(count)]


def set_of(batch: PlannedBatch) -> str:
    (name,) = {draw.stream[0] for draw in batch.draws}
    return name


class Ledger:
    """What was trained on: how often each sample in each epoch of its set.

    Args:
        carried: samples of a set and target shape that an epoch may leave to the next: fewer than there are ranks.
    """

    def __init__(self, streams: dict[Stream, int] = STREAMS, carried: int = 0) -> None:
        self.streams, self.carried = streams, carried
        self.seen: dict[tuple[str, int], Counter] = defaultdict(Counter)

    def note(self, batches: list[PlannedBatch]) -> None:
        """The batches of all ranks in one step; where they begin an epoch, what those past lack is counted."""
        for draw in sorted((draw for batch in batches for draw in batch.draws), key=lambda draw: draw.epoch):
            if (draw.stream[0], draw.epoch) not in self.seen:
                self.check_past(draw.stream[0], draw.epoch)
            self.seen[draw.stream[0], draw.epoch][draw.stream[1], draw.index] += 1

    def check_past(self, name: str, epoch: int) -> None:
        for shape in {bucket[0] for n, bucket in self.streams if n == name}:
            alike = {s[1]: size for s, size in self.streams.items() if s[0] == name and s[1][0] == shape}
            wanted = {(bucket, i) for bucket, size in alike.items() for i in range(size)}
            missing = sum(len(wanted - set(self.seen[name, past])) for past in range(epoch))
            assert missing <= self.carried, f"epoch {epoch} of {name} began with {missing} of {shape} missing"

    def check(self) -> int:
        """Every sample of every epoch came once at most, and at least in those that are over; returns full epochs."""
        full = 0
        for name in {name for name, _ in self.streams}:
            size = sum(n for stream, n in self.streams.items() if stream[0] == name)
            epochs = sorted(epoch for n, epoch in self.seen if n == name)
            assert epochs == list(range(len(epochs)))
            assert all(set(self.seen[name, epoch].values()) <= {1} for epoch in epochs)
            if epochs:
                self.check_past(name, epochs[-1])
            full += sum(len(self.seen[name, epoch]) == size for epoch in epochs)
        return full


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7, 32, 100])
def test_every_sample_comes_once_an_epoch_of_its_set(size: int, mixed: bool) -> None:
    """One rank: the epochs of a set follow each other without a rest, whatever its buckets' sizes."""
    ledger, made = Ledger(), plan(size, mixed=mixed)
    for _ in range(2000 // size):
        ledger.note([next(made)])
    assert ledger.check() >= 9


@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_of_several_ranks_leaves_fewer_samples_of_a_shape_than_ranks(mixed: bool) -> None:
    ledger = Ledger(carried=3)
    ranks = [plan(2, rank=rank, world_size=4, mixed=mixed) for rank in range(4)]
    for _ in range(300):
        ledger.note([next(rank) for rank in ranks])
    assert ledger.check() > 20


@pytest.mark.parametrize("world", [1, 3])
def test_a_set_of_one_bucket_has_full_batches_only(world: int) -> None:
    """Compiled blocks need one shape: what is left of an epoch goes first in a batch that begins the next."""
    stream = ("edit", ((64, 64), (64, 64)))
    ledger = Ledger({stream: 101})
    ranks = [Plan({stream: 101}, {"edit": 1}, lambda _: 8, 0, rank, world) for rank in range(world)]
    for _ in range(60):
        batches = [next(made) for made in ranks]
        assert [len(batch.draws) for batch in batches] == [8] * world
        ledger.note(batches)
    assert ledger.check() == 60 * 8 * world // 101


def test_a_small_bucket_comes_in_every_epoch_of_its_set() -> None:
    """1000 and 3 samples in batches of 32; 100,000 and 900 in batches of 32 on each of 64 ranks."""
    streams: dict[Stream, int] = {("edit", (SQUARE, SQUARE)): 1000, ("edit", (WIDE, WIDE)): 3}
    made = Plan(streams, {"edit": 1}, lambda bucket: 32, 0)
    ledger = Ledger(streams)
    for batch in first(made, 330):
        ledger.note([batch])
        assert batch.shape == SQUARE or len({draw.index for draw in batch.draws}) == len(batch.draws) == 3
    assert ledger.check() == 10
    streams = {("edit", (SQUARE, SQUARE)): 100_000, ("edit", (WIDE, WIDE)): 900}
    many = Plan(streams, {"edit": 1}, lambda bucket: 32, 0, world_size=64)
    steps = [many.advance() for _ in range(50)]  # 49.3 batches of 2,048 are an epoch
    small = [len(step) for step in steps if step[0][0][1][0] == WIDE]
    assert small == [896]
    assert many.cursors["edit", (SQUARE, SQUARE)] == 100_000 - 100_000 % 64


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world", [1, 3, 4, 8])
def test_no_batch_holds_a_sample_twice(world: int, mixed: bool) -> None:
    """Not even where samples that an epoch left are joined by others of the next, of shapes with two for each rank."""
    streams: dict[Stream, int] = {
        ("edit", (SQUARE, SQUARE)): 61, ("edit", (WIDE, WIDE)): 17, ("text_to_image", (SQUARE,)): 33,
    }  # fmt: skip
    made = Plan(streams, {"edit": 1, "text_to_image": 1}, lambda bucket: 5, 0, world_size=world, mixed=mixed)
    for _ in range(1000):
        places = made.advance()
        draws = [(s, d.index) for s in dict(places) for d in made._draws(s, [p for t, p in places if t == s])]
        assert len(draws) == len(set(draws)) and len(draws) % world == 0


def test_buckets_alike_fill_each_other_s_batches() -> None:
    """Many orders of references to one target's shape: none has a batch of its own, together they have."""
    sides = [(64, 32 * i) for i in range(1, 9)]
    streams: dict[Stream, int] = {("multi_reference", (SQUARE, side, WIDE)): 10 for side in sides}
    batches = first(Plan(streams, {"multi_reference": 1}, lambda bucket: 32, 0), 6)
    assert [len(batch.draws) for batch in batches] == [32, 32, 16] * 2
    ledger = Ledger(streams)
    for batch in batches:
        ledger.note([batch])
    assert ledger.check() == 2


@pytest.mark.parametrize("seed", range(5))
def test_the_ledger_over_twenty_stops_that_change_everything(seed: int) -> None:
    """Ranks, batch sizes, ratios and mixing change at each stop; rank 0 has prefetched what it never trains on."""
    rng, ledger, state = random.Random(seed), Ledger(carried=3), None
    for _ in range(20):
        world, size, mixed = rng.randint(1, 4), rng.randint(1, 5), rng.random() < 0.5
        ratio = {name: rng.choice([0, 1, 2, 0.5, 3]) for name in ("edit", "text_to_image", "multi_reference")}
        ratio["edit"] = ratio["edit"] or 1
        ranks = [plan(size, ratio, 7, rank=rank, world_size=world, mixed=mixed) for rank in range(world)]
        if state is not None:
            for rank in ranks:
                rank.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(rng.randint(1, 30)):
            together = [next(rank) for rank in ranks]
            assert len({batch.shape for batch in together}) == 1 and len({len(batch.draws) for batch in together}) == 1
            ledger.note(together)
        states = [rank.state_dict() for rank in ranks]
        assert states.count(states[0]) == world  # rank 0's is everyone's
        state = states[0]
        first(ranks[0], 3)  # prefetched, and lost with the process
    assert ledger.check() > 10


@pytest.mark.parametrize("mixed", [False, True])
def test_a_state_taken_anywhere_goes_on_as_if_nothing_had_happened(mixed: bool) -> None:
    whole = plan(mixed=mixed)
    for _ in range(40):
        saved = json.loads(json.dumps(whole.state_dict()))
        resumed = plan(mixed=mixed)
        resumed.load_state_dict(saved)
        assert first(resumed, 3) == first(copy.deepcopy(whole), 3)
        next(whole)


def test_advancing_moves_as_taking_does() -> None:
    taken, advanced = plan(), plan()
    for _ in range(50):
        next(taken)
        advanced.advance()
    assert taken.state_dict() == advanced.state_dict()


def test_ranks_share_what_one_would_take_alone() -> None:
    even: dict[Stream, int] = {("edit", (SQUARE, SQUARE)): 50, ("edit", (WIDE, WIDE)): 18}
    alone, *ranks = (
        Plan(even, {"edit": 1}, lambda bucket, size=size: size, 0, rank, world)
        for size, rank, world in ((8, 0, 1), (4, 0, 2), (4, 1, 2))
    )
    for _ in range(60):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert sorted(d.index for d in whole.draws) == sorted(d.index for part in parts for d in part.draws)
        assert {d.stream for d in whole.draws} == {d.stream for part in parts for d in part.draws}


def test_sets_alternate_by_ratio_and_buckets_by_size() -> None:
    batches = first(plan(), 3000)
    assert [set_of(batch) for batch in batches[:6]] == ["edit", "text_to_image", "edit"] * 2
    assert Counter(map(set_of, batches)) == {"edit": 2000, "text_to_image": 1000}
    edits = [batch for batch in batches if set_of(batch) == "edit"]
    wide = sum(len(batch.draws) for batch in edits if batch.shape == WIDE) / sum(len(b.draws) for b in edits)
    assert wide == pytest.approx(17 / 67, abs=0.002)


def test_buckets_of_a_set_keep_pace() -> None:
    made = plan(2, {"edit": 1})
    for _ in range(500):
        next(made)
        progress = [made.cursors[stream] / size for stream, size in STREAMS.items() if stream[0] == "edit"]
        assert max(progress) - min(progress) <= 2 / 17 + 1e-9


def test_mixed_batches_hold_sets_by_ratio_and_targets_of_one_shape() -> None:
    ratio = {"edit": 2, "text_to_image": 1, "multi_reference": 1}
    batches = first(plan(8, ratio, mixed=True), 400)
    assert all(len({draw.stream[1][0] for draw in batch.draws}) == 1 for batch in batches)
    counts = Counter(draw.stream[0] for batch in batches for draw in batch.draws)
    assert counts["edit"] / counts["text_to_image"] == pytest.approx(2, rel=0.02)
    assert counts["text_to_image"] == pytest.approx(counts["multi_reference"], rel=0.02)
    assert any(len({draw.stream[0] for draw in batch.draws}) == 3 for batch in batches)


def test_batches_may_differ_in_size_by_bucket() -> None:
    def by_area(bucket: Bucket) -> int:
        return 4 * 64 * 64 // sum(height * width for height, width in bucket)

    made = Plan(STREAMS, {"edit": 1, "text_to_image": 1}, by_area, 0)
    sizes: dict[str, int] = {}
    for batch in first(made, 100):
        name = name_of(batch.draws[0].stream)
        sizes[name] = max(sizes.get(name, 0), len(batch.draws))
    assert sizes == {
        "edit 64x64+64x64": 2,
        "edit 32x64+32x64": 4,
        "text_to_image 64x64": 4,
        "text_to_image 32x64": 3,  # of 8 it has as many
    }


def test_epochs_seeds_and_phases_differ() -> None:
    def order(made: Plan) -> tuple[int, ...]:
        return tuple(draw.index for draw in next(made).draws)

    only = {("edit", (SQUARE, SQUARE)): 50}
    made = Plan(only, {"edit": 1}, lambda bucket: 50, 0)
    orders = {order(made), order(made), order(Plan(only, {"edit": 1}, lambda bucket: 50, 1))}
    assert len(orders) == 3
    later = next(Plan(only, {"edit": 1}, lambda bucket: 4, 0, phase=2))
    assert later.phase == 2 and {draw.epoch for draw in later.draws} == {2 * PHASE_EPOCHS}


def test_a_set_that_is_left_out_for_a_while_keeps_its_place() -> None:
    made = plan()
    first(made, 20)
    before = made.cursors["text_to_image", (SQUARE,)]
    edits = plan(ratio={"edit": 1})
    edits.load_state_dict(made.state_dict())
    first(edits, 20)
    back = plan()
    back.load_state_dict(edits.state_dict())
    assert back.cursors["text_to_image", (SQUARE,)] == before > 0


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match="asks for video, but there are no training records of it"):
        plan(ratio={"video": 1})
    with pytest.raises(InputError, match="seed 0, this run's data has 3"):
        plan(seed=3).load_state_dict(plan().state_dict())
    state = plan().state_dict()
    with pytest.raises(InputError, match="came in version 1 of the order, this code has 2"):
        plan().load_state_dict({name: value for name, value in state.items() if name != "order"})
    assert "text_to_image 32x64: 3 samples for batches of 4 on 1 ranks: batches are smaller: 3" in "".join(
        plan().small()
    )
    assert "of 16 on 4 ranks: they wait for epochs" in "".join(plan(world_size=4).small())
    with pytest.raises(InputError, match="has 26 samples for 27 ranks"):
        list(plan(ratio={"text_to_image": 1}, world_size=27).small())


def test_the_mixer_is_even() -> None:
    mixer = Mixer({"a": 5, "b": 2})
    cycle = "".join(mixer.take(["a", "b"]) for _ in range(70))
    assert Counter(cycle) == {"a": 50, "b": 20} and "aaaa" not in cycle and "bb" not in cycle
