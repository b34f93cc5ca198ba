"""A table of picture URLs, fetched politely and within limits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from data_pipeline.errors import InputError
from data_pipeline.records import EncodedImage, Record, Rejected
from data_pipeline.sources.fetch import Limits, Unfetched, fetch
from data_pipeline.sources.layouts import columns_of
from data_pipeline.sources.manifest import RowReader, ranges, table_of
from data_pipeline.sources.pictures import Fault, sniffed
from data_pipeline.sources.protocol import Unit
from data_pipeline.sources.tables import read_rows

LONGEST = 86_400  # seconds of a time limit: sockets cannot wait for ever


@dataclass
class UrlList:
    """Rows with URLs of pictures and a text.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file, or a folder of such files.
        layout: the names of the columns; one of data_pipeline.sources.layouts.LAYOUTS.
        columns: other names than the layout's, such as {"target": "URL", "text": "TEXT"} of LAION.
        threads: rows fetched at a time by one task.
        seconds: time for one picture.
        max_bytes: size of one picture.
        allowed: hosts ("host" or "host:port") that may have a private address.
    """

    path: str = ""
    layout: str = "text_image"
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    threads: int = 16
    seconds: float = 20.0
    max_bytes: int = 1 << 26
    allowed: list[str] = field(default_factory=list)
    origin: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        columns_of(self.layout, self.columns)
        if self.threads < 1 or self.max_bytes < 1 or not 0 < self.seconds <= LONGEST:
            raise InputError(
                f"source.threads {self.threads}, max_bytes {self.max_bytes} and seconds {self.seconds:g}: expected at "
                f"least 1, and seconds above 0 and at most {LONGEST:,}"
            )

    def units(self, records: int) -> Iterator[Unit]:
        """Ranges of rows, file by file."""
        return ranges(self.path, records, columns_of(self.layout, self.columns))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a range of rows, their pictures fetched."""
        table = table_of(self.path, unit)
        reader = RowReader(columns_of(self.layout, self.columns), table, self.origin, self.licence)
        limits = Limits(self.seconds, self.max_bytes, frozenset(self.allowed))
        rows = read_rows(table, unit.where)
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := list(islice(rows, 4 * self.threads)):  # a few at a time, so that few wait in memory
                for found in pool.map(partial(reader.records, by_name=partial(fetched, limits)), batch):
                    yield from found


def fetched(limits: Limits, url: str) -> EncodedImage | Fault:
    """The picture behind a URL, or why not."""
    try:
        return sniffed(fetch(url, limits))
    except Unfetched as refused:
        return refused.reason, refused.detail
