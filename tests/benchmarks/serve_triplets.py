"""Edit triplets a second and process, served by us and by stock webdataset from the same tars, in one run.

python tests/benchmarks/serve_triplets.py

Exits with 1 where a ratio is below its bar.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from data_pipeline import serving
from data_pipeline.dataset import PlannedDataset
from data_pipeline.index import read_member, read_prompt, view_member
from data_pipeline.plan import Plan
from data_pipeline.recipe import Recipe
from data_pipeline.regroup import Rule
from data_pipeline.serving import ServingIndex
from data_pipeline.sources import Manifest

SIDE, TRAINED, BATCH = 1024, 512, 16


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of 1024 x 1024 pixels and about 250 kB."""
    layers = [rng.normal(0, 40 / level, (2**level, 2**level, 3)).astype(np.float32) for level in range(2, 10)]
    canvas = np.full((SIDE, SIDE, 3), 128, np.float32)
    for layer in layers:
        planes = [Image.fromarray(layer[..., c]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += np.stack([np.asarray(plane) for plane in planes], -1)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def build(folder: Path, triplets: int) -> Path:
    """Shards of triplets."""
    rng = np.random.default_rng(0)
    files = [picture(rng) for _ in range(24)]
    print(f"pictures of {np.mean([len(data) for data in files]) / 1000:.0f} kB")
    rows = []
    for i in range(triplets):
        for role, data in (("source", files[i % 24]), ("target", files[(i + 7) % 24])):
            (folder / f"{role}{i}.jpg").write_bytes(data + i.to_bytes(4, "big"))  # bytes behind the end: all distinct
        rows.append({"source": f"source{i}.jpg", "target": f"target{i}.jpg", "instruction": f"edit number {i}"})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Recipe(Manifest(str(folder / "edits.jsonl"), "edit"), records_per_shard=250).build(folder / "shards")
    return folder / "shards"


def stock(shards: Path) -> Iterator[dict]:
    """All samples as webdataset reads them."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    return iter(webdataset.WebDataset(urls, shardshuffle=False))


def stock_bytes(shards: Path, count: int) -> None:
    for sample in itertools.islice(stock(shards), count):
        json.loads(sample["json"])["instruction"]


def stock_pixels(shards: Path, count: int) -> None:
    for sample in itertools.islice(stock(shards), count):
        json.loads(sample["json"])["instruction"]
        for name in ("source0.jpg", "target.jpg"):
            with Image.open(io.BytesIO(sample[name])) as opened:
                small = opened.convert("RGB").resize((TRAINED, TRAINED), Image.Resampling.BICUBIC)
            torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 127.5 - 1


class Ours:
    """Samples in the plan's order, one process."""

    def __init__(self, shards: Path, index: Path) -> None:
        self.index = ServingIndex(serving.build(index, {"": [str(shards)]}, Rule(TRAINED, 32, 0.0)))
        self.plan = Plan(self.index.streams["train"], {"edit": 1}, lambda bucket: BATCH, 0)

    def read(self, count: int, read: Callable, verify: bool) -> None:
        for _ in range(count // BATCH):
            for draw in next(self.plan).draws:
                record = self.index.record("train", draw.stream, draw.index)
                read_prompt(record, verify)
                for name in ("source0", "target"):
                    read(record, name, verify)

    def pixels(self, count: int) -> None:
        dataset = PlannedDataset([self.index], "train", verify="always")
        for _ in range(count // BATCH):
            dataset[next(self.plan)]


def rate(work: Callable[[], None], count: int) -> float:
    """Triplets a second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def main() -> int:
    """Prints rates and ratios, medians of rounds that alternate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triplets", type=int, default=1008)
    parser.add_argument("--decoded", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = build(Path(name), arguments.triplets)
        ours, n, d = Ours(shards, Path(name) / "index"), arguments.triplets, arguments.decoded
        compared = {
            "mapped": (lambda: stock_bytes(shards, n), lambda: ours.read(n, view_member, False), n, 3.0),
            "copied": (lambda: stock_bytes(shards, n), lambda: ours.read(n, read_member, False), n, 0.0),
            "mapped, every hash checked": (
                lambda: stock_bytes(shards, n),
                lambda: ours.read(n, view_member, True),
                n,
                2.0,
            ),
            f"decoded to {TRAINED}": (lambda: stock_pixels(shards, d), lambda: ours.pixels(d), d, 2.0),
        }
        below = 0
        for what, (theirs, mine, count, bar) in compared.items():
            rates = [(rate(theirs, count), rate(mine, count)) for _ in range(arguments.rounds)]
            ratio = statistics.median(b / a for a, b in rates)
            below += ratio < bar
            a, b = (statistics.median(column) for column in zip(*rates, strict=True))
            print(f"{what}: webdataset {a:,.0f}, ours {b:,.0f} triplets/s, ratio {ratio:.2f} (bar {bar:g})", flush=True)
    return int(below > 0)


if __name__ == "__main__":
    sys.exit(main())
