"""A source whose every record comes several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_pipeline.errors import InputError
from data_pipeline.records import Record, Rejected
from data_pipeline.sources.protocol import Source, Unit


@dataclass
class Repeat:
    """Each record of `source` `times` times, under keys of their own, so that a step that draws makes several of it.

    What was one record stays one group: metadata's `group` is the key that it had.
    """

    source: Source
    times: int = 4

    def __post_init__(self) -> None:
        if self.times < 1:
            raise InputError(f"source.times is {self.times}; expected at least 1")

    def units(self, records: int) -> Iterator[Unit]:
        """The source's units, asked to be smaller by so much as their records are more."""
        yield from self.source.units(max(1, records // self.times))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The copies of a record follow each other; what was rejected is so once."""
        for record in self.source.read(unit):
            if isinstance(record, Rejected):
                yield record
                continue
            metadata = {**record.metadata, "group": record.key}
            yield from (replace(record, key=f"{record.key}-{i}", metadata=metadata) for i in range(self.times))
