"""Selecting among up to ten million records on their indexes (thresholds, duplicates and near-duplicates), and sorting
the indexes for training.

python tests/benchmarks/select_records.py [--records 100000 1000000 10000000]

Writes sidecar indexes as a build leaves them (4,096 records a shard, a row for every member: half captioned pictures,
half edits), in which 2 % of the records have a picture and text that stood before, and 2 % a perceptual hash within 4
bits of an earlier one. Each size runs in a process of its own. Prints a line of JSON for each, and one with the cost of
a record relative to the first size. Exits with 1 where that exceeds 2, memory 20 GiB, or other records were dropped
than those planted and the chance neighbours among random hashes, or others are served than were kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.index import KEEP, SUFFIX, with_scores
from data_pipeline.regroup import Rule
from data_pipeline.select import Selection, report, select
from data_pipeline.serving import ServingIndex, build
from data_pipeline.steps.columns import column

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "data" / "benchmarks"
PER_SHARD, BITS = 4096, 4
GROWTH, GIBIBYTES = 2.0, 20.0
PLAIN, EXACT, NEAR = range(3)
SCORES = [
    column("words", pa.int32(), "quality", "1"),
    column("aspect", pa.float32(), "quality", "1"),
    column("sharpness", pa.float32(), "quality", "1"),
    column("phash", pa.int64(), "phash", "1"),
]
RULES = Selection(where=["words >= 3", "aspect <= 3"], duplicates="record", near=BITS)


class Records:
    """What all records of one run are: facts by record number, drawn once.

    Duplicates copy a record of the first half that is no duplicate itself and passes the thresholds, each another one.
    """

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(count)
        self.words = rng.integers(0, 40, count, dtype=np.int32)
        self.aspect = rng.uniform(1, 3.5, count).astype(np.float32)
        self.passes = (self.words >= 3) & (self.aspect <= 3)
        self.origin = np.arange(count)  # whose pictures a record has
        self.kind = np.zeros(count, np.int8)
        self.phash = rng.integers(-(2**63), 2**63, count)
        planted = count // 2 + rng.choice(count - count // 2, 2 * (count // 50), replace=False)
        self.kind[planted[0::2]], self.kind[planted[1::2]] = EXACT, NEAR
        copied = rng.choice(np.flatnonzero(self.passes[: count // 2]), len(planted), replace=False)
        self.phash[planted] = self.phash[copied]
        self.origin[planted[0::2]] = copied[0::2]
        for _ in range(BITS):  # the same bit twice is no change: 0, 2 or 4 bits, and 0 is equal
            self.phash[planted[1::2]] ^= np.int64(1) << rng.integers(0, 63, len(planted) // 2)

    def expected(self) -> np.ndarray:
        """Sample ids of the records that the rules keep, chance neighbours aside."""
        return sample_ids(np.flatnonzero(self.passes & (self.kind == PLAIN)))


def digests(numbers: np.ndarray, salt: int) -> pa.Array:
    """32 random bytes for each number, equal for equal numbers."""
    seeded = (numbers.astype(np.uint64)[:, None] * np.uint64(4) + np.arange(4, dtype=np.uint64)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    seeded += np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        seeded = (seeded ^ (seeded >> np.uint64(shift))) * np.uint64(factor)
    seeded ^= seeded >> np.uint64(31)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(numbers), [None, pa.py_buffer(seeded.tobytes())])


def sample_ids(numbers: np.ndarray) -> np.ndarray:
    """A random 63-bit id for each record number."""
    words = np.frombuffer(digests(numbers, 1).buffers()[1], np.uint64).reshape(-1, 4)
    return (words[:, 0] >> np.uint64(1)).astype(np.int64)


def write_index(folder: Path, records: Records, start: int, stop: int) -> None:
    """The sidecar of one shard: rows of a picture and JSON, or of a source, a target and JSON, record by record."""
    numbers = np.arange(start, stop)
    members = np.where(numbers % 2, 3, 2)
    row = np.repeat(numbers, members)
    place = np.concatenate([np.arange(m) for m in members])
    edit, last = row % 2 == 1, place == np.repeat(members, members) - 1
    names = np.where(last, 0, np.where(edit, np.where(place == 0, 1, 2), 3))
    size = np.where(last, 300, 200_000)

    def named(values: list[str], codes: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), values).cast(pa.string())

    same = np.zeros(len(row), np.int8)
    columns = {
        "key": pa.array([f"picture-{number:012d}" for number in row]),
        "sample_id": sample_ids(row),
        "kind": named(["text_image", "edit"], edit.astype(np.int8)),
        "split": named([""], same),
        "origin": named(["photos.jsonl"], same),
        "licence": named(["CC-BY-4.0"], same),
        "turn": pa.nulls(len(row), pa.int16()),
        "text_length": records.words[row] * np.int32(6),
        "text_sha256": digests(records.origin[row], 2),
        "pictures_sha256": digests(records.origin[row], 3),
        "field": named(["json", "source0", "target", "image"], names),
        "extension": named(["json", "jpg"], (~last).astype(np.int8)),
        "offset": np.cumsum(size) - size,
        "size": size,
        "width": np.where(last, 0, 1024).astype(np.int32),
        "height": np.where(last, 0, 768).astype(np.int32),
        "sha256": digests(row * 3 + place, 4),
        "xxh3": (row * 3 + place).astype(np.uint64),
        "words": records.words[row],
        "aspect": records.aspect[row],
        "sharpness": records.aspect[row] * np.float32(100),
        "phash": records.phash[row],
    }
    path = folder / f"{start:09d}{SUFFIX}"
    pq.write_table(pa.table(columns).cast(with_scores(SCORES)), path, compression="zstd")
    with open(path.with_name(f"{start:09d}.tar"), "wb") as tar:
        tar.truncate(int(size.sum()))  # a hole: nothing here reads pictures


def measure(count: int) -> dict[str, object]:
    """Writes the indexes of `count` records, selects, and says what it took and whether it was right."""
    records = Records(count)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        for start in range(0, count, PER_SHARD):
            write_index(folder, records, start, min(start + PER_SHARD, count))
        size = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        before, seconds = resource.getrusage(resource.RUSAGE_SELF), []
        for _ in range(3 if count < 5_000_000 else 1):
            began = time.perf_counter()
            funnel = select(folder, RULES)
            seconds.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        index = ServingIndex(build(folder / "index", {"": [str(folder)]}, Rule(512, 32, 0.0)))
        sorting = time.perf_counter() - began
        kept = pq.read_table(folder / KEEP, columns=["sample_id"])["sample_id"].to_numpy()
    print(report(funnel), file=sys.stderr)
    return {
        "records": count,
        "index_gib": round(size / 2**30, 2),
        "seconds": round(statistics.median(seconds), 2),
        "index_seconds": round(sorting, 2),
        "cpu_seconds": round((cpu(after) - cpu(before)) / len(seconds), 2),
        "peak_gib": round(after.ru_maxrss / 2**20, 2),
        "kept": len(kept),
        "served": sum(index.streams["train"].values()),
        "planted_but_kept": len(np.setdiff1d(kept, records.expected())),
        "dropped_by_chance": len(np.setdiff1d(records.expected(), kept)),
        "chance": round(chance_neighbours(len(kept)), 2),
    }


def cpu(usage: resource.struct_rusage) -> float:
    """Processor time in seconds."""
    return usage.ru_utime + usage.ru_stime


def chance_neighbours(count: int) -> float:
    """Pairs of `count` random 64-bit numbers that are expected within BITS of each other."""
    return count**2 / 2 * sum(math.comb(64, bits) for bits in range(BITS + 1)) / 2**64


def right(found: dict) -> bool:
    """Whether all that was planted was dropped, and no more than chance explains, at five standard deviations."""
    most = found["chance"] + 5 * math.sqrt(found["chance"] + 1)
    return found["planted_but_kept"] == 0 and found["served"] == found["kept"] and found["dropped_by_chance"] <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--one", action="store_true", help="run one size in this process")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        print(json.dumps(measure(arguments.records[0])))
        return 0
    found = []
    for count in arguments.records:
        command = [sys.executable, __file__, "--one", "--records", str(count)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(done.stdout.strip(), flush=True)
    growth = {}
    for what in ("seconds", "index_seconds"):
        cost = [f[what] / f["records"] for f in found]
        growth[what] = [round(c / cost[0], 2) for c in cost]
    print(json.dumps({"cost_of_a_record": growth, "load": round(os.getloadavg()[0], 1)}))
    within = max(map(max, growth.values())) <= GROWTH and max(f["peak_gib"] for f in found) <= GIBIBYTES
    return 0 if within and all(map(right, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
