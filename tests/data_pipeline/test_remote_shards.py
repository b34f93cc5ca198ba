"""Training on shards behind a real HTTP server that fails, stalls and cuts answers short: never a short epoch."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from micro import micro_shards
from servers import Server

from data_pipeline import read_ahead, remote
from data_pipeline.cache import FeatureStore, fill
from data_pipeline.datamodule import ShardDataModule
from data_pipeline.dataset import PlannedDataset, wanted_features
from data_pipeline.errors import InputError
from data_pipeline.foreign import index
from data_pipeline.plan import Plan
from data_pipeline.read_ahead import LocalCopies, fetched
from data_pipeline.regroup import Rule
from data_pipeline.serving import ServingIndex, build

RATIO = {"edit": 1, "text_to_image": 1}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "STALL", 0.5)
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def served(server: Server, tmp_path: Path) -> ServingIndex:
    shards = micro_shards(tmp_path / "shards", 24, 24)
    for tar in shards.glob("*.tar"):
        tar.rename(server.folder / tar.name)
    index([server.url(tar.name) for tar in sorted(server.folder.iterdir())], tmp_path / "indexes")
    return ServingIndex(build(tmp_path / "index", {"": [str(tmp_path / "indexes")]}, Rule(64, 32, 0.0)))


def epoch(served: ServingIndex, copies: LocalCopies | None = None, first: int = 0) -> list:
    """All batches of an epoch or a little more."""
    plan = Plan(served.streams["train"], RATIO, lambda bucket: 4, 0)
    for _ in range(first):
        plan.advance()
    dataset = PlannedDataset([served], "train", copies=copies)
    return [dataset[next(plan)] for _ in range(12)]


def test_an_epoch_is_whole_and_bit_equal_whatever_the_server_does(
    served: ServingIndex, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 30)  # half of all answers fail: some range has six of them in a row
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    calm = epoch(served)
    rng = random.Random(0)
    server.faults = [rng.choice(["", "", "500", "cut"]) for _ in range(200)]
    server.faults[5] = server.faults[40] = "stall"
    stormy = epoch(served)
    assert len(server.faults) < 140  # they were used
    for a, b in zip(calm, stormy, strict=True):
        assert a.keys == b.keys and torch.equal(a.target, b.target)
    keys = Counter(key for batch in stormy for key in batch.keys)
    assert len(keys) == sum(served.streams["train"].values()) - 4 or set(keys.values()) <= {1, 2}


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_a_server_that_never_recovers_is_a_named_error(
    served: ServingIndex, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote, "STALL", 0.1)
    server.faults = [fault] * 1000
    with pytest.raises(InputError, match=r"cannot read http://127.0.0.1:\d+/.*\.tar"):
        epoch(served)


def test_a_record_is_one_request(served: ServingIndex, server: Server) -> None:
    ((stream, count),) = [(s, n) for s, n in served.streams["train"].items() if s[0] == "edit"]
    records = [served.record("train", stream, i) for i in range(count)]
    fetched([served.record("train", stream, i) for i in range(count)], [])  # asks once for each tar what it is now
    before = server.requests
    found = fetched(records)
    assert server.requests - before == count
    assert all(set(record.held) == {"target", "source0", "json"} for record in found)
    assert {len(r.held[n]) - r.members[n].size for r in found for n in r.held} == {0}


def test_what_was_read_once_is_not_asked_for_again(served: ServingIndex, server: Server, tmp_path: Path) -> None:
    copies = LocalCopies(str(tmp_path / "copies"), 1.0)
    first = epoch(served, copies)
    before = server.requests
    again = epoch(served, copies)
    assert server.requests == before
    assert all(torch.equal(a.target, b.target) for a, b in zip(first, again, strict=True))
    for path in (tmp_path / "copies").iterdir():  # a damaged copy is asked for again
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    mended = epoch(served, copies)
    assert server.requests > before
    assert all(torch.equal(a.target, b.target) for a, b in zip(first, mended, strict=True))


def test_the_folder_of_copies_is_bounded(served: ServingIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "SWEEP", 2)
    epoch(served, LocalCopies(str(tmp_path / "copies"), 10e-6))
    held = sum(path.stat().st_size for path in (tmp_path / "copies").iterdir())
    assert 0 < held < 10_000 + 32 * 4_000
    with pytest.raises(InputError, match="gigabytes must be above 0"):
        LocalCopies(str(tmp_path), 0)


def test_many_threads_may_keep_one_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "read_range", lambda url, start, end: bytes(range(start, end)))
    copies = LocalCopies(str(tmp_path / "copies"))
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda _: copies.read("http://store/a.tar", "1", 3, 200), range(64)))
    assert set(found) == {bytes(range(3, 200))} and len(list((tmp_path / "copies").iterdir())) == 1


def test_a_tar_replaced_behind_a_url_is_named(served: ServingIndex, server: Server) -> None:
    epoch(served)
    remote.check_unchanged.cache_clear()  # another run
    server.tag = '"2"'
    with pytest.raises(InputError, match=r"replaced since it was indexed: .* the tag \"2\", .*; index it again"):
        epoch(served)


def test_validation_and_texts_use_the_local_copies(
    served: ServingIndex, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copies = LocalCopies(str(tmp_path / "copies"))
    data = ShardDataModule([str(tmp_path / "indexes")], batch_size=4, val_batches=2, remote_copies=copies)
    data.setup("fit")

    def read() -> int:
        before = server.requests
        assert len(list(data.val_dataloader())) == 2 and data.sample_batches(1) and list(data.prompts())
        assert list(data.first_batches())
        return server.requests - before

    assert read() > 0 and read() == 0


def test_filling_a_cache_waits_for_many_ranges_at_a_time(
    served: ServingIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, running, most = remote.read_range, [], []

    def slow(url: str, start: int, end: int) -> bytes:
        running.append(start)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(start)
        return plain(url, start, end)

    monkeypatch.setattr(remote, "read_range", slow)
    wanted = wanted_features(served.records("train"), False)
    assert fill(FeatureStore(tmp_path / "cache", "f" * 64), Means(), wanted, served.pictures("train")) > 40
    assert max(most) > 4


class Means:
    fingerprint = "f" * 64

    def to(self, device: str) -> None:
        pass

    def encode(self, inputs: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{"moments": pixels.mean(0)} for pixels in inputs]
