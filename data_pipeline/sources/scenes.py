"""The embedded world as a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import InputError
from data_pipeline.records import Record
from data_pipeline.scenes import records
from data_pipeline.scenes.world import LEVELS


@dataclass
class Scenes:
    """Rendered scenes: `count_text_image` captioned pictures, then `count_edit` edits; a sixteenth is held out."""

    level: int = 1
    count_text_image: int = 8192
    count_edit: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(f"source.level is {self.level}; scenes have the levels {sorted(LEVELS)}")
        if min(self.count_text_image, self.count_edit) < 0 or self.count_text_image + self.count_edit == 0:
            raise InputError("source.count_text_image and source.count_edit must be 0 or more, and not both 0")

    def __iter__(self) -> Iterator[Record]:
        return records(self.level, self.count_text_image, self.count_edit, self.seed)
