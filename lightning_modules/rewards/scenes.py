"""Rewards that read scenes back exactly from pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.scenes.captions import Caption, caption_from, satisfied
from data_pipeline.scenes.edits import Edit, edit_success
from data_pipeline.scenes.verifier import Reading, read
from data_pipeline.scenes.world import Object, parse
from data_pipeline.steps.scene_judge import followed, kept
from lightning_modules.rewards.protocol import Request


class SceneReward:
    """Judges captions and edits of scenes.

    Args:
        kind: "strict": 1 where all is right, else 0. "soft": partly right counts in part; for captions the mean over
            clauses of 1 - |wanted - found| / wanted as in Flow-GRPO's GenEval reward, less objects nobody asked for;
            for edits the share of changed cells that are as wanted, times preservation.
    """

    def __init__(self, kind: Literal["strict", "soft"] = "soft") -> None:
        self.kind = kind

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        pixels = (pictures.clamp(0, 1) * 255).permute(0, 2, 3, 1).cpu().numpy().round()
        return [self.one(picture, request) for picture, request in zip(pixels, requests, strict=True)]

    def one(self, picture: np.ndarray, request: Request) -> float:
        """Of one picture, (H, W, 3) in [0, 255]."""
        facts = request.metadata
        if "scene" not in facts or not ("source" in facts or "meaning" in facts):
            raise InputError(
                f"SceneReward got {request.prompt!r} with the facts {sorted(facts)}; expected records of scenes, built "
                'with their "scene" and its "meaning" or "source"'
            )
        target = parse(facts["scene"])
        reading = read(picture, target.level)
        if "source" not in facts:
            caption = caption_from(request.prompt, facts["task"], facts["meaning"])
            return float(satisfied(caption, reading.scene)) if self.kind == "strict" else soft_caption(caption, reading)
        edit = Edit(facts["task"], request.prompt, parse(facts["source"]), target)
        return float(edit_success(edit, reading)) if self.kind == "strict" else soft_edit(edit, reading)


def soft_edit(edit: Edit, reading: Reading) -> float:
    """Share of what the instruction changes that is as wanted, times the share of the rest that is as before."""
    return followed(edit, reading) * kept(edit, reading)


def soft_caption(caption: Caption, reading: Reading) -> float:
    """Mean over clauses of how nearly each has its number of objects; what no clause asked for, or cannot be read,
    takes as much away as an object that is missing. 1 exactly where the caption is satisfied."""
    if satisfied(caption, reading.scene):
        return 1.0
    found = [o for o in reading.cells if isinstance(o, Object)]
    wanted = sum(clause.count for clause in caption.clauses)
    kinds = Counter(caption.clauses)
    near = [
        max(0.0, 1 - abs(n * clause.count - sum(clause.matches(o) for o in found)) / (n * clause.count))
        for clause, n in kinds.items()
    ]
    extra = sum(o is not None for o in reading.cells) - wanted
    score = sum(near) / len(near) - max(0, extra) / wanted
    if caption.relation is not None or (caption.background not in (None, reading.background)):
        score /= 2  # all may be there, and yet the relation or the background is wrong
    return min(max(0.0, score), 0.9)
