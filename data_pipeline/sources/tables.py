"""Rows of JSONL, JSON, CSV, TSV, text and Parquet files, in units of some thousand, each readable alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import InputError
from data_pipeline.records import Rejected
from data_pipeline.sources.folder import printable
from data_pipeline.sources.lines import BOM, Row, line_units, read_lines, storable_row
from data_pipeline.sources.protocol import Unit, digest

MAX_JSON = 1 << 30  # bytes of a .json file, which has to be read whole
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPACE = re.compile(r"[ \t\r\n]*")


def table_units(path: Path, rows: int) -> Iterator[Unit]:
    """Ranges of about `rows` rows: byte ranges, or ranges of row groups. Reads the file once."""
    match path.suffix.lower():
        case ".parquet":
            yield from _row_groups(path, rows)
        case ".json":
            yield from _json_ranges(path, rows)
        case _:
            yield from line_units(path, rows)


def read_rows(path: Path, where: dict[str, Any]) -> Iterator[Row | Rejected]:
    """The rows of a unit; a row that cannot be read is a rejection named by its number."""
    match path.suffix.lower():
        case ".parquet":
            yield from _read_row_groups(path, where)
        case ".json":
            yield from _read_json(path, where)
        case _:
            yield from read_lines(path, where)


def _json_ranges(path: Path, rows: int) -> Iterator[Unit]:
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"{size} bytes, at most {MAX_JSON}; convert it to JSONL, one object a line")
        data = path.read_bytes()
        spans = _elements(data.decode("utf-8-sig"), len(BOM) if data.startswith(BOM) else 0)
        first = 1
        while part := list(islice(spans, rows)):
            start, stop = part[0][0], part[-1][1]
            where = {"file": path.name, "start": start, "stop": stop, "first": first}
            content = hashlib.sha256(data[start:stop]).hexdigest()
            yield Unit(f"{printable(path.name)} rows {first}-{first + len(part) - 1}", where, content)
            first += len(part)
    except (ValueError, RecursionError) as error:
        raise InputError(f"source.path {path}: {error}; one object a line goes into a .jsonl file") from error


def _elements(text: str, offset: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of the elements of a JSON list, the text of which begins at byte `offset`."""

    def skip(position: int) -> int:
        found = SPACE.match(text, position)
        return found.end() if found else position

    decoder, position, done = json.JSONDecoder(), skip(0), 0
    if text[position : position + 1] != "[":
        raise ValueError(f"expected a list of objects, got {text[position : position + 40]!r}")
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        _, end = decoder.raw_decode(text, position)
        start = offset + position - done
        offset = start + len(text[position:end].encode())
        yield start, offset
        done, position = end, skip(end)
        if text[position : position + 1] not in (",", "]"):
            raise ValueError(f"expected a comma or the list's end at character {position}")
        if text[position] == ",":
            position = skip(position + 1)
    if skip(position + 1) != len(text):
        raise ValueError(f"there is more behind the list's end at character {position}")


def _read_json(path: Path, where: dict[str, Any]) -> Iterator[Row | Rejected]:
    with open(path, "rb") as file:
        file.seek(where["start"])
        data = file.read(where["stop"] - where["start"])
    try:
        rows = json.loads(b"[" + data + b"]")
    except ValueError as error:
        raise InputError(f"source.path {path} changed while it was read: {error}; build again") from error
    for number, row in enumerate(rows, where["first"]):
        try:
            yield number, storable_row(row)
        except ValueError as error:
            yield Rejected(f"line-{number}", "bad_json", f"{printable(path.name)} line {number}: {error}")


def _row_groups(path: Path, rows: int) -> Iterator[Unit]:
    """Row groups are never split: reading one costs the whole of it."""
    table, footer = _parquet(path), _footer(path)
    first, start, count = 1, 0, 0
    for group in range(table.num_row_groups):
        count += table.metadata.row_group(group).num_rows
        if count and (count >= rows or group == table.num_row_groups - 1):
            where = {"file": path.name, "start": start, "stop": group + 1, "first": first}
            content = digest(path.stat().st_size, footer, start, group + 1)
            yield Unit(f"{printable(path.name)} rows {first}-{first + count - 1}", where, content)
            first, start, count = first + count, group + 1, 0


def _footer(path: Path) -> str:
    """A hash of where everything lies in a Parquet file, and of its smallest and largest values."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _read_row_groups(path: Path, where: dict[str, Any]) -> Iterator[Row | Rejected]:
    table, number = _parquet(path), where["first"]
    for group in range(where["start"], where["stop"]):
        following = number + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(batch_size=64, row_groups=[group]):
                for i in range(batch.num_rows):
                    yield from _row(path, number, batch.slice(i, 1))
                    number += 1
        except (pa.ArrowException, OSError) as error:  # a damaged page: nothing behind it can be found
            for lost in range(number, following):
                detail = f"{printable(path.name)} line {lost}: {' '.join(str(error).split())}"
                yield Rejected(f"line-{lost}", "damaged_rows", detail)
        number = following


def _row(path: Path, number: int, row: pa.RecordBatch) -> Iterator[Row | Rejected]:
    try:
        yield number, row.to_pylist()[0]
    except ValueError as error:  # a text that is not UTF-8
        yield Rejected(f"line-{number}", "damaged_rows", f"{printable(path.name)} line {number}: {error}")


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"source.path {path} is no whole Parquet file: {what}; fetch it again") from error
