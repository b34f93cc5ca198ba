"""Planning a billion samples: memory, time to the first batch and to each next, from a simulated index on disk.

python tests/benchmarks/plan_billion.py
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
from data_pipeline.serving import ServingIndex

SIZES = [(512, 512), (384, 512), (512, 384), (288, 512), (512, 288), (320, 512), (512, 320), (256, 512)]


def simulate(folder: Path, shards: int, each: int) -> None:
    """The summary of an index: counts by shard and stream, as `serving.build` leaves it."""
    columns = [["", "train", "edit", [size, size]] for size in SIZES] + [
        ["", "train", "text_to_image", [s]] for s in SIZES
    ]
    counts = np.random.default_rng(0).multinomial(each, np.full(len(columns), 1 / len(columns)), size=shards)
    np.save(folder / "counts.npy", counts.astype(np.int64))
    files = [f"{i:020x}.json" for i in range(shards)]
    (folder / "index.json").write_text(json.dumps({"columns": columns, "files": files, "content": "simulated"}))


def measure(folder: Path, batches: int) -> dict[str, float]:
    """In this process: seconds to the first batch, microseconds for each next at several places, peak memory."""
    before = resident()
    started = time.perf_counter()
    index = ServingIndex(folder)
    plan = Plan(index.streams["train"], {"edit": 2, "text_to_image": 1}, lambda bucket: 32, 0)
    planned = next(plan)
    places = [index.locate("train", draw.stream, draw.index) for draw in planned.draws]
    assert len(places) == 32
    first = time.perf_counter() - started
    found: dict[str, float] = {"samples": sum(index.streams["train"].values()), "first_batch_s": first}
    for name, skipped in (("next_us", 0), ("next_us_after_1e8", 10**8), ("next_us_after_2e9", 2 * 10**9)):
        for stream, size in plan.streams.items():
            plan.cursors[stream] += int(skipped * size / found["samples"])
        started = time.perf_counter()
        for _ in range(batches):
            for draw in next(plan).draws:
                index.locate("train", draw.stream, draw.index)
        found[name] = (time.perf_counter() - started) / batches * 1e6
    found["memory_mib"] = (resident() - before) / 2**20
    return found


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Prints one line for each size of index, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--each", type=int, default=10_000, help="records a shard")
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--measure", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.batches)))
        return
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            simulate(Path(folder), shards, arguments.each)
            simulated = time.perf_counter() - started
            argv = [sys.executable, __file__, "--measure", folder, "--batches", str(arguments.batches)]
            result = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        figures = "  ".join(f"{name} {value:,.4g}" for name, value in result.items())
        print(f"{shards:,} shards (simulated in {simulated:.1f} s)  {figures}", flush=True)


if __name__ == "__main__":
    main()
