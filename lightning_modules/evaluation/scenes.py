"""Success on held-out scenes, judged exactly by the scene verifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.scenes import benchmark, visual_questions
from data_pipeline.scenes.captions import TASK_WEIGHTS, Caption, satisfied
from data_pipeline.scenes.edits import Edit, edit_success, preservation
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.verifier import read
from data_pipeline.scenes.world import LEVELS
from lightning_modules.evaluation.understanding import score_answers
from lightning_modules.pipelines import KontextPipeline

T = TypeVar("T")
GUIDANCE = "_guidance_"  # before the scale, in the name of a metric at other than the first


@dataclass
class SceneBenchmark:
    """Which scenes, and how they are sampled: one picture for each of `count` held-out captions and edits.

    `guidance_scales`: the first names the metrics without suffix; further ones are reported as `<metric>_guidance_<s>`.
    `negative_prompt`: None takes the pipeline's; a model whose captions were dropped to "" knows that one best.
    `tasks`: what is measured, of "text_to_image", "edit" and, of a model that can be asked, "understanding".
    `caption_level`: that of captions, where it is another one than the edits'.
    `caption_tasks`: which of GenEval's tasks the captions are of; None takes all.
    """

    level: int = 1
    count: int = 1024
    num_inference_steps: int = 20
    guidance_scales: tuple[float, ...] = (3.5, 1.0)
    negative_prompt: str | None = None
    tasks: tuple[str, ...] = ("text_to_image", "edit")
    batch_size: int = 128
    seed: int = 0
    caption_level: int | None = None
    caption_tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tasks or set(self.tasks) - {"text_to_image", "edit", "understanding"}:
            raise InputError(
                f"benchmark.tasks must be some of text_to_image, edit and understanding, got {list(self.tasks)}"
            )
        for level in (self.level, self.captions_at):
            if level not in LEVELS:
                raise InputError(f"benchmark.level is {level!r}; scenes have the levels {sorted(LEVELS)}")
        if not self.held_out_tasks or set(self.held_out_tasks) - set(TASK_WEIGHTS["val"]):
            known = ", ".join(TASK_WEIGHTS["val"])
            raise InputError(f"benchmark.caption_tasks is {self.caption_tasks!r}; held-out captions are of {known}")
        counts = {"count": self.count, "num_inference_steps": self.num_inference_steps, "batch_size": self.batch_size}
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise InputError(f"benchmark.{name} is {value!r}; expected a whole number of at least 1")
        if not self.guidance_scales or any(type(s) not in (int, float) for s in self.guidance_scales):
            raise InputError(f"benchmark.guidance_scales is {self.guidance_scales!r}; expected at least one number")

    @property
    def captions_at(self) -> int:
        """The captions' level."""
        return self.level if self.caption_level is None else self.caption_level

    @property
    def held_out_tasks(self) -> tuple[str, ...]:
        """The captions' tasks."""
        return tuple(TASK_WEIGHTS["val"]) if self.caption_tasks is None else self.caption_tasks


def evaluate(pipeline: KontextPipeline, settings: SceneBenchmark) -> dict[str, float]:
    """All metrics of the benchmark, each a share in [0, 1]."""
    return means(outcomes(pipeline, settings), settings)


def held_out(settings: SceneBenchmark) -> tuple[list[Caption], list[Edit]]:
    """The captions and the edits, in their order."""
    captions, _ = benchmark(settings.captions_at, settings.count, settings.seed, settings.held_out_tasks)
    return captions, benchmark(settings.level, settings.count, settings.seed)[1]


def outcomes(pipeline: KontextPipeline, settings: SceneBenchmark) -> dict[str, list[float]]:
    """What became of each caption (`t2i_success`), edit (`edit_success`, `preservation`) and question
    (`understanding`), in their order."""
    captions, edits = held_out(settings)
    found: dict[str, list[float]] = {}
    for scale in settings.guidance_scales:
        suffix = "" if scale == settings.guidance_scales[0] else f"{GUIDANCE}{scale:g}"
        if "text_to_image" in settings.tasks:
            found[f"t2i_success{suffix}"] = score_captions(pipeline, captions, settings, scale)
        if "edit" in settings.tasks:
            scored = score_edits(pipeline, edits, settings, scale)
            found |= {f"{name}{suffix}": values for name, values in scored.items()}
    if "understanding" in settings.tasks:
        if not hasattr(pipeline, "ask"):
            raise InputError("benchmark.tasks names understanding, and this model cannot be asked; leave it out")
        asked = visual_questions.benchmark(settings.level, settings.count, settings.seed)
        found["understanding"] = score_answers(pipeline, asked, settings.batch_size)
    return found


def means(found: Mapping[str, Sequence[float]], settings: SceneBenchmark) -> dict[str, float]:
    """Means of outcomes: `t2i_success`, and the same for each GenEval task; `edit_success`, and the same for each kind
    of edit; `preservation`, the share of untouched cells unchanged; `understanding`, that of questions answered word
    for word, and the same for each kind."""
    captions, edits = held_out(settings)
    kinds = {"t2i_success": [c.task for c in captions], "edit_success": [e.kind for e in edits]}
    asked = (
        visual_questions.benchmark(settings.level, settings.count, settings.seed) if "understanding" in found else []
    )
    kinds["understanding"] = [question.kind for question in asked]
    metrics: dict[str, float] = {}
    for name, values in found.items():
        base, guidance, scale = name.partition(GUIDANCE)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for kind, value in zip(kinds.get(base, []), values, strict=base in kinds):
            by_kind[kind].append(value)
        metrics[name] = fmean(values)
        metrics |= {f"{base}_{kind}{guidance}{scale}": fmean(by_kind[kind]) for kind in sorted(by_kind)}
    return metrics


def score_captions(
    pipeline: KontextPipeline, captions: Sequence[Caption], settings: SceneBenchmark, guidance_scale: float
) -> list[float]:
    """Of each caption whether its picture shows what it says."""
    found: list[float] = []
    for number, chunk in batches(captions, settings.batch_size):
        prompts = [caption.text for caption in chunk]
        pictures = generate(pipeline, prompts, None, settings, guidance_scale, number)
        for caption, picture in zip(chunk, pictures, strict=True):
            found.append(int(satisfied(caption, read(picture, settings.captions_at).scene)))
    return found


def score_edits(
    pipeline: KontextPipeline, edits: Sequence[Edit], settings: SceneBenchmark, guidance_scale: float
) -> dict[str, list[float]]:
    """Of each edit whether all is as instructed, and the share of untouched cells unchanged."""
    done: list[float] = []
    kept: list[float] = []
    for number, chunk in batches(edits, settings.batch_size):
        sources = [Image.fromarray(render(edit.source)) for edit in chunk]
        instructions = [edit.instruction for edit in chunk]
        pictures = generate(pipeline, instructions, sources, settings, guidance_scale, number)
        for edit, picture in zip(chunk, pictures, strict=True):
            reading = read(picture, settings.level)
            done.append(int(edit_success(edit, reading)))
            kept.append(preservation(edit, reading))
    return {"edit_success": done, "preservation": kept}


def batches(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Consecutive slices of at most `size`, numbered."""
    for number, start in enumerate(range(0, len(items), size)):
        yield number, items[start : start + size]


def generate(
    pipeline: KontextPipeline,
    prompts: list[str],
    sources: list[Image.Image] | None,
    settings: SceneBenchmark,
    guidance_scale: float,
    number: int,
) -> np.ndarray:
    """One picture a prompt, (B, H, W, 3) in [0, 255]; noise depends on the seed and the batch's number alone."""
    side = LEVELS[settings.level if sources else settings.captions_at].resolution
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + number)
    pictures = pipeline(
        prompts,
        image=sources,
        height=side,
        width=side,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=settings.negative_prompt,
        generator=generator,
        output_type="np",
        return_dict=False,
    )[0]
    return np.rint(pictures * 255)
