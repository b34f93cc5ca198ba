"""Text-to-image success before and after a model refines its own pictures (generate, plan, edit).

python tests/benchmarks/grape.py runs/joint/latest/export [--rounds 2] [--count 256] [--level 1] [--vlm FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from lightning_modules.evaluation.refinement import refinement
from lightning_modules.evaluation.scenes import SceneBenchmark
from lightning_modules.pipelines import MetaqueryPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a Metaquery model")
    parser.add_argument("--vlm", help="its vision-language model, where the folder comes without")
    parser.add_argument("--rounds", type=int, default=2, help="edits of a picture, at most")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--negative", help='negative prompt; "" where captions were dropped to it in training')
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = SceneBenchmark(
        given.level, given.count, given.steps, (given.guidance,), given.negative, ("text_to_image",), seed=given.seed
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = refinement(MetaqueryPipeline.from_pretrained(given.export, given.vlm).to(device), settings, given.rounds)
    pairs = list(zip(found["before"], found["after"], strict=True))
    print(f"t2i_success before {fmean(found['before']):.3f}, after {fmean(found['after']):.3f} ({len(pairs)} captions)")
    print(f"{pairs.count((0, 1))} mended, {pairs.count((1, 0))} spoilt")


if __name__ == "__main__":
    main()
