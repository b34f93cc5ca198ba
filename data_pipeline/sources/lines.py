"""Rows of files of lines: JSONL, CSV, TSV and plain text, cut and read by the same rules."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.records import Rejected
from data_pipeline.sources.folder import printable
from data_pipeline.sources.protocol import Unit

MAX_LINE = 1 << 20  # bytes; a longer line is no row of names and texts
MAX_LINES = 256  # of a CSV row; looking further for the end of a quote would take a hostile file quadratic time
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"

Row = tuple[int, dict[str, Any]]  # its number in the file, from 1 (of a line the line's), and its fields


def line_units(path: Path, rows: int) -> Iterator[Unit]:
    """Ranges of about `rows` rows, cut at the ends of rows."""
    delimiter, name = DELIMITERS.get(path.suffix.lower(), ""), printable(path.name)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        header = next(line_groups(file, size, delimiter), []) if delimiter else []
        names = _header(path, header, delimiter)
        first = 1 + len(header)
        while file.tell() < size:
            start, count, content = file.tell(), 0, hashlib.sha256(repr(names).encode())
            for lines in islice(line_groups(file, size, delimiter), rows):
                count += len(lines)
                content.update(b"".join(lines))
            where = {"file": path.name, "start": start, "stop": file.tell(), "first": first, "names": names}
            yield Unit(f"{name} lines {first}-{first + count - 1}", where, content.hexdigest())
            first += count


def _header(path: Path, lines: list[bytes], delimiter: str) -> list[str]:
    """The columns' names of a CSV file."""
    try:
        names = next(csv.reader([line.decode() for line in lines], delimiter=delimiter or ",", strict=True), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"source.path {path}: its first line must name the columns, in UTF-8: {error}") from error
    if len(set(names)) < len(names):
        raise InputError(f"source.path {path}: its first line names a column twice: {', '.join(names)}")
    return names


def line_groups(file: BinaryIO, stop: int, delimiter: str) -> Iterator[list[bytes]]:
    """The lines of each row up to byte `stop`: one, unless a quoted CSV field holds line ends.

    Where a quote is never closed as it should be, the row is its first line alone, which is no CSV, and the next line
    begins a row: one stray quote must not swallow the rows behind it.
    """
    while file.tell() < stop:
        lines = [_line(file)]
        following = file.tell()
        if delimiter and b'"' in lines[0]:
            try:
                next(csv.reader(_growing(file, stop, lines), delimiter=delimiter, strict=True))
            except csv.Error:
                lines = lines[:1]
                file.seek(following)
        yield lines


def _growing(file: BinaryIO, stop: int, lines: list[bytes]) -> Iterator[str]:
    """The lines and, as they are asked for, a few of those that follow; one byte is one character, which keeps quotes,
    commas and line ends."""
    yield lines[0].decode("latin-1")
    while file.tell() < stop and len(lines) < MAX_LINES:
        lines.append(_line(file))
        yield lines[-1].decode("latin-1")


def _line(file: BinaryIO) -> bytes:
    """The next line, of one that is too long no more than shows it."""
    line = part = file.readline(MAX_LINE + 1)
    while len(part) > MAX_LINE and not part.endswith(b"\n"):
        part = file.readline(MAX_LINE + 1)
    return line


def read_lines(path: Path, where: dict[str, Any]) -> Iterator[Row | Rejected]:
    """The rows of a unit; an empty line is none."""
    suffix = path.suffix.lower()
    reason = {".csv": "bad_csv", ".tsv": "bad_csv", ".txt": "bad_text"}.get(suffix, "bad_json")
    with open(path, "rb") as file:
        file.seek(where["start"])
        number = where["first"]
        for lines in line_groups(file, where["stop"], DELIMITERS.get(suffix, "")):
            if any(line.strip() for line in lines):
                try:
                    yield number, _parsed(suffix, lines, where["names"])
                except (ValueError, RecursionError, csv.Error) as error:
                    yield Rejected(f"line-{number}", reason, f"{printable(path.name)} line {number}: {error}")
            number += len(lines)


def _parsed(suffix: str, lines: list[bytes], names: list[str]) -> dict[str, Any]:
    """The fields of a row; a line of a .txt file is the field "text"."""
    if max(map(len, lines)) > MAX_LINE:
        raise ValueError(f"a line of more than {MAX_LINE} bytes")
    if suffix == ".txt":
        return {"text": lines[0].decode("utf-8-sig").strip()}
    if suffix not in DELIMITERS:
        return storable_row(json.loads(lines[0].decode("utf-8-sig")))
    values = next(csv.reader([line.decode() for line in lines], delimiter=DELIMITERS[suffix], strict=True))
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields, the header has {len(names)}")
    return dict(zip(names, values, strict=True))


def storable_row(row: Any) -> dict[str, Any]:
    """A row that is an object of text that can be stored."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {json.dumps(row)[:60]}")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and is no text
    return row
