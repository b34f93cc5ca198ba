"""Columns of what records carry along: tasks, and the scores that a data set came with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from data_pipeline.errors import InputError
from data_pipeline.records import Record
from data_pipeline.steps.columns import column

KINDS = {"text": pa.string(), "number": pa.float64()}


@dataclass
class Metadata:
    """A column for each name of a record's metadata, so that rules can speak of it: "task == swap", "o_score >= 8".

    Null where a record has no such value, or one of another kind.

    Args:
        names: "text" or "number" by the name of the metadata, {"task": "text", "o_score": "number"}.
    """

    names: dict[str, Literal["text", "number"]] = field(default_factory=dict)
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if not self.names or not all(name.isidentifier() and kind in KINDS for name, kind in self.names.items()):
            raise InputError(f"names of metadata are {self.names}; expected text or number, by names of letters and _")

    def columns(self) -> list[pa.Field]:
        """Names and types."""
        return [column(name, KINDS[kind], "metadata", "1") for name, kind in self.names.items()]

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """The values of each record."""
        read = {"text": text, "number": number}
        return [{name: read[kind](r.metadata.get(name)) for name, kind in self.names.items()} for r in records]


def text(value: Any) -> str | None:
    """A text, or a whole number as one."""
    return str(value) if isinstance(value, str | int) else None


def number(value: Any) -> float | None:
    """A finite number, also where it was written as a text, as CSV has it."""
    try:
        found = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
