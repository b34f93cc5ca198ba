"""The embedded world as a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import InputError
from data_pipeline.records import Record, Rejected
from data_pipeline.scenes import ALL_LEVELS, FREE, TASK_WEIGHTS, edit_record, text_image_record
from data_pipeline.sources.protocol import Unit, digest

VAL_SHARE = 1 / 16  # of captions and of edits, at their end


@dataclass
class Scenes:
    """Rendered scenes: `count_text_image` captioned pictures, then `count_edit` edits; a sixteenth is held out.

    `tasks`: share of each GenEval task among the captions, of levels 1 and 2; None takes the usual ones.
    """

    level: int = 1
    count_text_image: int = 8192
    count_edit: int = 16384
    seed: int = 0
    tasks: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.level not in ALL_LEVELS:
            raise InputError(f"source.level is {self.level}; scenes have the levels {list(ALL_LEVELS)}")
        if min(self.count_text_image, self.count_edit) < 0 or self.count_text_image + self.count_edit == 0:
            raise InputError("source.count_text_image and source.count_edit must be 0 or more, and not both 0")
        known = {} if self.level == FREE else TASK_WEIGHTS["train"]
        if self.tasks is not None and (set(self.tasks) - set(known) or not self.weights("train")):
            raise InputError(
                f"source.tasks is {self.tasks} at level {self.level}; expected shares above 0 of some of "
                f"{', '.join(known) or 'none: level 3 has no tasks'}"
            )

    def weights(self, split: str) -> dict[str, float]:
        """Shares of the tasks that a part has."""
        return {task: share for task, share in (self.tasks or {}).items() if task in TASK_WEIGHTS[split] and share > 0}

    def units(self, records: int) -> Iterator[Unit]:
        """Ranges of numbered captions, then of numbered edits."""
        for kind, count in (("text_image", self.count_text_image), ("edit", self.count_edit)):
            for start in range(0, count, records):
                where = {"kind": kind, "start": start, "stop": min(start + records, count)}
                yield Unit(f"{kind} scenes {start + 1}-{where['stop']}", where, digest(where))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a range of numbers, rendered."""
        captions = unit.where["kind"] == "text_image"
        count = self.count_text_image if captions else self.count_edit
        for number in range(unit.where["start"], unit.where["stop"]):
            split = "val" if number >= count * (1 - VAL_SHARE) else "train"
            if captions:
                yield text_image_record(self.level, self.seed, number, split, self.weights(split) or None)
            else:
                yield edit_record(self.level, self.seed, number, split)
