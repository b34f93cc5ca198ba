"""Level 3 of the embedded world: shapes anywhere, one before another, in pictures of several formats."""

from __future__ import annotations

import random

from data_pipeline.scenes.captions import TASK_WEIGHTS
from data_pipeline.scenes.free.captions import FreeCaption, describe, draw_canvas
from data_pipeline.scenes.free.world import Canvas


def random_caption(rng: random.Random, split: str) -> tuple[Canvas, FreeCaption]:
    """A canvas of `split` and its caption; the task is drawn by weight (the single-object tasks only in "train")."""
    weights = TASK_WEIGHTS[split]
    task = rng.choices(list(weights), list(weights.values()))[0]
    while True:
        canvas = draw_canvas(rng, task)
        if canvas.split == split:
            return canvas, describe(rng, canvas, task)
