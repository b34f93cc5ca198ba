"""The order of batches: every sample once an epoch of its stream, wherever and however often a run is resumed."""

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
    """What was trained on: how often each sample in each epoch of its stream."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Stream, int], Counter] = defaultdict(Counter)

    def note(self, batch: PlannedBatch) -> None:
        for draw in batch.draws:
            self.seen[draw.stream, draw.epoch][draw.index] += 1

    def check(self, streams: dict[Stream, int] = STREAMS) -> int:
        """Every epoch but a stream's last holds each sample exactly once, the last none twice; returns full epochs."""
        full = 0
        for stream, size in streams.items():
            epochs = sorted(epoch for s, epoch in self.seen if s == stream)
            assert epochs == list(range(len(epochs)))
            for epoch in epochs:
                counts = self.seen[stream, epoch]
                assert set(counts.values()) == {1} and set(counts) <= set(range(size))
                assert len(counts) == size or epoch == epochs[-1]
                full += len(counts) == size
        return full


@pytest.mark.parametrize("mixed", [False, True])
def test_every_sample_comes_once_an_epoch_of_its_stream(mixed: bool) -> None:
    ledger = Ledger()
    for batch in first(plan(mixed=mixed), 300):
        ledger.note(batch)
    assert ledger.check() > 20


@pytest.mark.parametrize("seed", range(5))
def test_the_ledger_over_twenty_stops_that_change_everything(seed: int) -> None:
    """Ranks, batch sizes, ratios and mixing change at each stop; rank 0 has prefetched what it never trains on."""
    rng, ledger, state = random.Random(seed), Ledger(), None
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
            for batch in together:
                ledger.note(batch)
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
    alone, ranks = plan(8), [plan(4, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(60):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert sorted(d.index for d in whole.draws) == sorted(d.index for part in parts for d in part.draws)
        assert {d.stream for d in whole.draws} == {d.stream for part in parts for d in part.draws}


def test_sets_alternate_by_ratio_and_buckets_by_size() -> None:
    batches = first(plan(), 3000)
    assert [set_of(batch) for batch in batches[:6]] == ["edit", "text_to_image", "edit"] * 2
    assert Counter(map(set_of, batches)) == {"edit": 2000, "text_to_image": 1000}
    wide = sum(batch.shape == WIDE for batch in batches if set_of(batch) == "edit")
    assert wide / 2000 == pytest.approx(17 / 67, abs=0.002)


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
    sizes = {(batch.draws[0].stream): len(batch.draws) for batch in first(made, 100)}
    assert {name_of(stream): size for stream, size in sizes.items()} == {
        "edit 64x64+64x64": 2,
        "edit 32x64+32x64": 4,
        "text_to_image 64x64": 4,
        "text_to_image 32x64": 8,
    }


def test_epochs_seeds_and_phases_differ() -> None:
    def order(made: Plan) -> tuple[int, ...]:
        return tuple(draw.index for draw in next(made).draws)

    made = plan(50, {"edit": 1})
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
    assert any("text_to_image 32x64: 3 samples for batches of 4" in line for line in plan().small())
    with pytest.raises(InputError, match="has 26 samples for 27 ranks"):
        list(plan(ratio={"text_to_image": 1}, world_size=27).small())


def test_the_mixer_is_even() -> None:
    mixer = Mixer({"a": 5, "b": 2})
    cycle = "".join(mixer.take(["a", "b"]) for _ in range(70))
    assert Counter(cycle) == {"a": 50, "b": 20} and "aaaa" not in cycle and "bb" not in cycle
