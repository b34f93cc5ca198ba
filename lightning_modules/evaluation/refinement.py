"""What generate, plan, edit (GraPE, arXiv 2412.06089) changes: success on held-out captions before and after it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from data_pipeline.counters import counter_seed
from data_pipeline.errors import InputError
from data_pipeline.scenes.captions import satisfied
from data_pipeline.scenes.verifier import read
from lightning_modules.evaluation.scenes import SceneBenchmark, batches, generate, held_out
from lightning_modules.pipelines.grape import refine
from lightning_modules.pipelines.metaquery import MetaqueryPipeline


def refinement(pipeline: MetaqueryPipeline, settings: SceneBenchmark, rounds: int = 2) -> dict[str, list[int]]:
    """Of each caption whether its picture shows what it says, 1 or 0: `before`, and `after` at most so many edits by
    the model's own answers. Pictures and edits are sampled at the benchmark's first guidance scale."""
    if rounds < 1:
        raise InputError(f"rounds of refinement are {rounds}; expected at least 1")
    found: dict[str, list[int]] = {"before": [], "after": []}
    scale = settings.guidance_scales[0]
    for number, chunk in batches(held_out(settings)[0], settings.batch_size):
        prompts = [caption.text for caption in chunk]
        made = generate(pipeline, prompts, None, settings, scale, number)
        first = [Image.fromarray(picture.astype(np.uint8)) for picture in made]
        refined = refine(
            pipeline,
            prompts,
            first,
            rounds,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=scale,
            negative_prompt=settings.negative_prompt,
            generator=torch.Generator().manual_seed(counter_seed(settings.seed, "refinement", 0, number)),
        )
        for name, pictures in (("before", first), ("after", refined)):
            readings = [read(np.asarray(picture), settings.captions_at) for picture in pictures]
            found[name] += [int(satisfied(c, seen.scene)) for c, seen in zip(chunk, readings, strict=True)]
    return found
