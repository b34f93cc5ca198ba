"""Shards damaged in every way a disk or a download damages them: nothing is lost silently, no triplet is crossed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.index import sidecar
from data_pipeline.recipe import Recipe
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Scenes, WebDataset
from data_pipeline.steps import Decode


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(data: bytes, rng: random.Random) -> bytes:
    page = rng.randrange(0, len(data), 4096)
    return data[:page] + bytes(min(4096, len(data) - page)) + data[page + 4096 :]


def page_lost(data: bytes, rng: random.Random) -> bytes:
    page = rng.randrange(0, len(data), 4096)
    return data[:page] + data[page + 4096 :]


Damage = Callable[[bytes, random.Random], bytes]
DAMAGE: dict[str, Damage] = {
    "page lost": page_lost,
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "flipped bits": flipped,
    "zeroed page": zeroed,
    "HTML": lambda data, rng: b"<html><body>503 Service Unavailable</body></html>" * rng.randint(1, 99),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of edits with its index."""
    folder = tmp_path_factory.mktemp("whole")
    Recipe(Scenes(1, 0, 14, 0)).build(folder / "out")
    return next((folder / "out").glob("*.tar"))


def read(tar: Path) -> tuple[dict[str, Record], list[Rejected]]:
    """Records by key, and the ledger, of a build that reads the tar."""
    source, decode = WebDataset(str(tar)), Decode()
    items = [item for unit in source.units(0) for item in source.read(unit)]
    items = [item if isinstance(item, Rejected) else decode(item) for item in items]
    return {item.key: item for item in items if not isinstance(item, Rejected)}, [
        item for item in items if isinstance(item, Rejected)
    ]


def check(shard: Path, folder: Path, damage: Damage, seed: int, indexed: bool) -> None:
    tar = folder / f"{seed}.tar"
    tar.write_bytes(damage(shard.read_bytes(), random.Random(seed)))
    if indexed:
        shutil.copy(sidecar(shard), sidecar(tar))
    whole, _ = read(shard)
    found, ledger = read(tar)
    missing = whole.keys() - found.keys()
    assert found.keys() <= whole.keys()
    assert missing <= {rejected.key for rejected in ledger} if indexed else (not missing or ledger)
    for key, record in found.items():
        assert record.images == whole[key].images
        assert record == whole[key] or not indexed  # without an index a letter changed in a text cannot be known


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_missing_sample_is_accounted_for(kind: str, shard: Path, tmp_path: Path) -> None:
    for seed in range(10):
        check(shard, tmp_path, DAMAGE[kind], seed, indexed=True)
        check(shard, tmp_path, DAMAGE[kind], seed, indexed=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_missing_sample_of_1000_shards_is_accounted_for(kind: str, shard: Path, tmp_path: Path) -> None:
    for seed in range(200):
        check(shard, tmp_path, DAMAGE[kind], seed, indexed=True)
        check(shard, tmp_path, DAMAGE[kind], seed, indexed=False)


def test_the_ledger_is_written_and_names_the_place(shard: Path, tmp_path: Path) -> None:
    data = shard.read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.tar").write_bytes(data[: len(data) // 2])
    manifest = Recipe(WebDataset(str(tmp_path / "in"))).build(tmp_path / "out")
    (task,) = (tmp_path / "out").glob("*.task.json")
    ledger = json.loads(task.read_bytes())["ledger"]
    assert "no_end" in {entry["reason"] for entry in ledger}
    assert sum(manifest["rejected"].values()) == len(ledger) and "cut.tar" in ledger[0]["detail"]
