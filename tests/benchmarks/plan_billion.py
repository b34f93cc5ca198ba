"""Planning a billion samples: memory, time to the first batch and to each next, from a simulated index on disk.

python tests/benchmarks/plan_billion.py

Exits with 1 where the first batch takes 5 seconds, a later one three times as long as an early one, or memory grows
with the number of samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.plan import Plan
from data_pipeline.regroup import NUMBERS
from data_pipeline.serving import ServingIndex, rows_each

SIZES = [(512, 512), (384, 512), (512, 384), (288, 512), (512, 288), (320, 512), (512, 320), (256, 512)]


def simulate(folder: Path, shards: int, each: int) -> None:
    """An index as `serving.merge` leaves it, its array a hole in the file."""
    kinds = [("edit", [size, size]) for size in SIZES] + [("text_to_image", [size]) for size in SIZES]
    counts = np.random.default_rng(0).multinomial(shards * each, np.full(len(kinds), 1 / len(kinds)))
    columns, first = [], 0
    for (kind, bucket), count in zip(kinds, counts.tolist(), strict=True):
        columns.append(["", "train", kind, bucket, count, first])
        first += count * rows_each(kind, tuple(bucket))
    texts = [("key", "S16"), ("extension", "S4"), ("role", "u1"), ("shard", "<i4"), ("sha256", "S32")]
    dtype = np.dtype([*texts, *((name, "<u8" if name == "xxh3" else "<i8") for name in NUMBERS)])
    np.lib.format.open_memmap(folder / "rows.npy", "w+", dtype, (first,))
    table = np.zeros(shards, [("location", "S64"), ("size", "<i8"), ("tag", "S20"), ("place", "S16")])
    table["location"], table["tag"] = b"/shards/a.tar", b"0"
    np.save(folder / "shards.npy", table)
    (folder / "index.json").write_text(json.dumps({"columns": columns, "content": "simulated"}))


def measure(folder: Path, batches: int) -> dict[str, float]:
    """In this process: seconds to the first batch, microseconds for each next at several places, peak memory."""
    before = resident()
    started = time.perf_counter()
    index = ServingIndex(folder)
    plan = Plan(index.streams["train"], {"edit": 2, "text_to_image": 1}, lambda bucket: 32, 0)
    planned = next(plan)
    records = [index.record("train", draw.stream, draw.index) for draw in planned.draws]
    assert len(records) == 32
    first = time.perf_counter() - started
    found: dict[str, float] = {"samples": sum(index.streams["train"].values()), "first_batch_s": first}
    for name, skipped in (("next_us", 0), ("next_us_after_1e8", 10**8), ("next_us_after_2e9", 2 * 10**9)):
        for stream, size in plan.streams.items():
            plan.cursors[stream] += int(skipped * size / found["samples"])
        started = time.perf_counter()
        for _ in range(batches):
            for draw in next(plan).draws:
                index.record("train", draw.stream, draw.index)
        found[name] = (time.perf_counter() - started) / batches * 1e6
    found["memory_mib"] = (resident() - before) / 2**20
    return found


def resident() -> int:
    """Bytes that this process holds now, without those of mapped files, which the system may take back."""
    _, resident, shared, *_ = (int(number) for number in Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


def within(found: dict[str, float], smallest: dict[str, float]) -> bool:
    """Whether an index keeps the bars, next to the smallest."""
    slowest = max(found["next_us"], found["next_us_after_1e8"], found["next_us_after_2e9"])
    flat = slowest < 3 * smallest["next_us"] + 100 and found["memory_mib"] < 2 * smallest["memory_mib"] + 8
    return found["first_batch_s"] < 5 and flat


def main() -> int:
    """Prints one line for each size of index, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--each", type=int, default=10_000, help="records a shard")
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--measure", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.batches)))
        return 0
    results = []
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            simulate(Path(folder), shards, arguments.each)
            simulated = time.perf_counter() - started
            argv = [sys.executable, __file__, "--measure", folder, "--batches", str(arguments.batches)]
            result = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        results.append(result)
        figures = "  ".join(f"{name} {value:,.4g}" for name, value in result.items())
        print(f"{shards:,} shards (simulated in {simulated:.1f} s)  {figures}", flush=True)
    return 0 if all(within(result, results[0]) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
