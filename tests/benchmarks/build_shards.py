"""Building shards of resized pictures, in turns with img2dataset on the same files, sizes and JPEG quality.

python tests/benchmarks/build_shards.py [--pictures 1500] [--sides 256 512] [--rounds 3]

Both read one CSV of file:// URLs and captions of 1024-pixel JPEGs, shrink the longer side, write WebDataset tars of
JPEGs of quality 95 with two processes, and hash every picture. img2dataset runs in an environment of its own, which is
made on first use (it pins an old webdataset), with the fastest settings found: no EXIF, eight threads a process.
Seconds are those of the whole command, so starting Python counts for both; `ratio_without_start` leaves out what a run
of 16 pictures takes. Prints one line of JSON; exits with 1 where the ratio of medians is below 1.5, outputs agree to
less than 38 dB, a picture is missing, or one that needs no resizing changes its bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "data" / "benchmarks"
BAR, DECIBELS = 1.5, 38.0
RECIPE = """
source: {{class_path: data_pipeline.sources.Manifest, init_args: {{path: {table}, layout: text_image}}}}
steps: [{{class_path: data_pipeline.steps.resize.Resize, init_args: {{longer_side: {side}, quality: 95}}}}]
records_per_shard: {per_shard}
"""


def texture(side: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with the spectrum of photographs and weaker, smoother colour than light: (side, side, 3) around 0."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf

    def field(slope: float) -> np.ndarray:
        made = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequency**slope, (side, side))
        return (made / made.std()).astype(np.float32)

    light = 40 * field(1.3)
    return np.stack([light + 15 * field(1.6) for _ in range(3)], -1)


def make_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of quality 90 whose longer side is 1024 pixels: cuts of a texture under a slow change of light."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), [folder / f"{i:06d}.jpg" for i in range(count)]
    if not all(name.is_file() for name in names):
        large = texture(2048, rng)
        for name in names:
            height, width = [(1024, 768), (768, 1024), (1024, 1024), (683, 1024)][rng.integers(4)]
            y, x = rng.integers(2048 - height), rng.integers(2048 - width)
            slope = np.linspace(*rng.uniform(-40, 40, 2), width, dtype=np.float32)[:, None]
            pixels = large[y : y + height, x : x + width][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            pixels = pixels * np.float32(rng.uniform(0.7, 1.2)) + slope + np.float32(rng.uniform(100, 150))
            buffer = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            name.write_bytes(buffer.getvalue())
    return names


def write_table(path: Path, pictures: list[Path]) -> Path:
    """The CSV that both read; `image` is the same file as `url`."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "image", "caption"])
        for name in pictures:
            writer.writerow([name.as_uri(), os.path.relpath(name, path.parent), f"picture {name.stem}"])
    return path


def img2dataset() -> Path:
    """The command in its own environment, which is made if it is not there."""
    environment = CACHE / "img2dataset-venv"
    command = environment / "bin" / "img2dataset"
    if not command.is_file():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", "img2dataset==1.47.0"], check=True)
    return command


def ours(table: Path, side: int, per_shard: int, output: Path) -> list[str]:
    recipe = output.with_suffix(".yaml")
    recipe.write_text(RECIPE.format(table=table, side=side, per_shard=per_shard))
    return [sys.executable, "-m", "data_pipeline", "build", "-c", str(recipe), "--output", str(output), "--workers=2"]


def theirs(table: Path, side: int, per_shard: int, output: Path) -> list[str]:
    options = {
        "url_list": table,
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": output,
        "image_size": side,
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "processes_count": 2,
        "thread_count": 8,
        "number_sample_per_shard": per_shard,
        "extract_exif": False,
    }
    return [str(img2dataset()), *(f"--{name}={value}" for name, value in options.items())]


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall and processor time of a command that must succeed; no library may look for a newer version of itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pictures_by_url(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The pictures in the tars of a folder, ours or theirs, by the URL they came from."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, rest = member.name.partition(".")
                found.setdefault(key, {})[rest.split(".")[-1]] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for sample in found.values():
            facts = json.loads(sample["json"])
            yield facts.get("metadata", facts)["url"], sample["jpg"]


def agreement(one: Path, other: Path, count: int) -> float:
    """The least PSNR in dB of any picture's two versions; 0 where a picture is missing or of another size."""
    left, right = dict(pictures_by_url(one)), dict(pictures_by_url(other))
    if left.keys() != right.keys() or len(left) != count:
        return 0.0
    worst = np.inf
    for url, data in left.items():
        a, b = (np.asarray(Image.open(io.BytesIO(d)).convert("RGB"), np.float32) for d in (data, right[url]))
        if a.shape != b.shape:
            return 0.0
        worst = min(worst, 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))
    return float(worst)


def compare(table: Path, few: Path, side: int, count: int, rounds: int, scratch: Path) -> dict[str, float]:
    """Both commands in turns at one size: seconds, ratios and how well their pictures agree."""
    tools: dict[str, Callable[[Path, int, int, Path], list[str]]] = {"ours": ours, "img2dataset": theirs}
    taken: dict[str, list[tuple[float, float]]] = {f"{name}{what}": [] for name in tools for what in ("", "_start")}
    for number in range(rounds):
        for name, tool in tools.items():
            taken[name].append(seconds(tool(table, side, -(-count // 6), scratch / f"{name}-{side}-{number}")))
            taken[f"{name}_start"].append(seconds(tool(few, side, 8, scratch / f"{name}-{side}-{number}-few")))
    wall, processor = ({name: statistics.median(f[i] for f in found) for name, found in taken.items()} for i in (0, 1))
    net = {name: wall[name] - wall[f"{name}_start"] for name in tools}
    return {
        **{f"{name}_seconds": round(value, 2) for name, value in wall.items()},
        **{f"{name}_cpu_seconds": round(processor[name], 2) for name in tools},
        "ratio": round(wall["img2dataset"] / wall["ours"], 2),
        "ratio_without_start": round(net["img2dataset"] / net["ours"], 2),
        "psnr_db": round(agreement(scratch / f"ours-{side}-0", scratch / f"img2dataset-{side}-0", count), 1),
    }


def bytes_kept(few: Path, scratch: Path) -> bool:
    """Whether pictures that fit the size asked for keep their bytes."""
    seconds(ours(few, 1024, 8, scratch / "same"))
    found = dict(pictures_by_url(scratch / "same"))
    return len(found) == 16 and all(Path(unquote(urlsplit(url).path)).read_bytes() == d for url, d in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pictures = make_pictures(CACHE / "pictures", arguments.pictures)
    table = write_table(CACHE / "pictures.csv", pictures)
    few = write_table(CACHE / "few.csv", pictures[:16])
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        kept = bytes_kept(few, Path(scratch))
        found = {
            side: compare(table, few, side, len(pictures), arguments.rounds, Path(scratch)) for side in arguments.sides
        }
    good = all(f["ratio"] >= BAR and f["psnr_db"] >= DECIBELS for f in found.values())
    size = sum(name.stat().st_size for name in pictures) // len(pictures)
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({"pictures": len(pictures), "bytes_each": size, "load": load, "bytes_kept": kept, "sides": found}))
    return 0 if kept and good else 1


if __name__ == "__main__":
    sys.exit(main())
