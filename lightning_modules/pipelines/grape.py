"""Generate, plan, edit (GraPE, arXiv 2412.06089): a model looks at its own picture, says what is wrong and edits it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from lightning_modules.pipelines.metaquery import MetaqueryPipeline

QUESTION = "What must change to get {}?"  # as the pocket VLM was taught; any other VLM is asked in its own words
DONE = "nothing"


def refine(
    pipeline: MetaqueryPipeline,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    rounds: int = 2,
    question: str = QUESTION,
    done: str = DONE,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
) -> list[Image.Image]:
    """Pictures after at most so many edits each, all of the model's own instruction.

    Args:
        pipeline: what looks and edits.
        prompts: what the pictures should show.
        pictures: as they were generated.
        rounds: edits of a picture, at most.
        question: what is asked of a picture; {} is its prompt.
        done: the answer after which a picture is left alone.
        num_inference_steps, guidance_scale, negative_prompt, generator: of the edits, as the pipeline takes them.
    """
    found, open_ones = list(pictures), list(range(len(pictures)))
    for _ in range(rounds):
        if not open_ones:
            break
        asked = [question.format(prompts[i]) for i in open_ones]
        plans = dict(zip(open_ones, pipeline.ask(asked, [found[i] for i in open_ones]), strict=True))
        open_ones = [i for i, plan in plans.items() if plan and plan.strip(" .").lower() != done]
        if open_ones:
            edits = pipeline(
                [plans[i] for i in open_ones],
                image=[found[i] for i in open_ones],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                generator=generator,
                return_dict=False,
            )[0]
            for i, picture in zip(open_ones, edits, strict=True):
                found[i] = picture
    return found
