"""Edits of scenes judged exactly: the columns of a judge, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.records import EditRecord, Record
from data_pipeline.scenes.edits import Edit, preservation
from data_pipeline.scenes.verifier import UNREADABLE, Reading, read
from data_pipeline.scenes.world import LEVELS, parse
from data_pipeline.steps.columns import column
from data_pipeline.steps.pixels import pixels

DIMENSIONS = ("instruction", "preservation", "legibility")
GRIDS = tuple(f"{level}|" for level in LEVELS)  # what the text of a scene of these levels begins with


@dataclass
class SceneJudge:
    """Columns as of a VlmJudge, from 0 to 1: `judge_instruction` (share of what the instruction changes that is as
    wanted), `judge_preservation` (share of the rest that is as before), `judge_legibility` (share of cells that show
    one clean object or none); and `judge_note`: null, or why a record has no score."""

    batch_size: int = 256

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        numbers = [column(f"judge_{name}", pa.float32(), "scenes", "1") for name in DIMENSIONS]
        return [*numbers, column("judge_note", pa.string(), "scenes", "1")]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column."""
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> Mapping[str, Any]:
        facts, names = record.metadata, [f"judge_{name}" for name in DIMENSIONS]
        if not isinstance(record, EditRecord) or not str(facts.get("scene")).startswith(GRIDS) or "source" not in facts:
            return {**dict.fromkeys(names), "judge_note": "no edit between scenes of level 1 or 2"}
        target, picture = parse(facts["scene"]), pixels(record.target)
        side = LEVELS[target.level].resolution
        if picture.shape != (side, side, 3):
            size = f"{picture.shape[1]} x {picture.shape[0]}"
            return {**dict.fromkeys(names), "judge_note": f"the picture is {size}, expected {side} x {side}"}
        edit = Edit(facts["task"], record.prompt, parse(facts["source"]), target)
        reading = read(picture, target.level)
        values = followed(edit, reading), kept(edit, reading), legible(reading)
        return {**dict(zip(names, values, strict=True)), "judge_note": None}


def followed(edit: Edit, reading: Reading) -> float:
    """Share of what the instruction changes, cells and background, that is as wanted; 1 where it changes nothing."""
    changed = set(range(len(reading.cells))) - set(edit.untouched)
    done = [reading.cells[cell] == edit.target.at(cell) for cell in changed]
    if edit.source.background != edit.target.background:
        done.append(reading.background == edit.target.background)
    return float(np.mean(done)) if done else 1.0


def kept(edit: Edit, reading: Reading) -> float:
    """Share of the other cells that are as before; 0 where the background changed unasked."""
    if edit.source.background == edit.target.background != reading.background:
        return 0.0
    return preservation(edit, reading)


def legible(reading: Reading) -> float:
    """Share of cells that can be read."""
    return 1 - reading.cells.count(UNREADABLE) / len(reading.cells)
