"""What a source is: parts that can be read alone, in any process and any order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.records import Record, Rejected


@dataclass(frozen=True)
class Unit:
    """One part of a source, read by one task.

    Args:
        name: what a person calls it, for progress and errors ("edits.jsonl lines 1-4096").
        where: how the source finds it again; plain data.
        content: a hash of what lies there: other content makes it another unit.
    """

    name: str
    where: dict[str, Any]
    content: str


class Source(Protocol):
    """Where records come from. Listing is cheap and deterministic; reading a unit needs nothing but the unit."""

    def units(self, records: int) -> Iterator[Unit]:
        """The parts, each of about `records` records, in a fixed order."""

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """What a unit holds; keys are unique in the whole source."""


def digest(*parts: Any) -> str:
    """A hash of plain data: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
