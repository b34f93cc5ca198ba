"""A table that says which pictures belong together: JSONL, JSON, CSV or Parquet, in any of the field's layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.records import EncodedImage, Record, Rejected, slug
from data_pipeline.sources.archives import Archives, grouped
from data_pipeline.sources.conversations import RowError
from data_pipeline.sources.drafts import draft, sessions
from data_pipeline.sources.folder import existing_path, printable
from data_pipeline.sources.layouts import Columns, columns_of
from data_pipeline.sources.lines import Row
from data_pipeline.sources.pictures import ByName, picture_name, read_image, read_picture
from data_pipeline.sources.protocol import Unit, digest
from data_pipeline.sources.tables import SUFFIXES, read_rows, table_units


@dataclass
class Manifest:
    """Rows of a table, each with the names of its pictures or the pictures themselves.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file, or a folder of such files; of prompts also .txt, one a line.
        layout: the names of the columns; one of data_pipeline.sources.layouts.LAYOUTS.
        columns: other names than the layout's, such as {"text": "my_caption", "sources": ["before", "mask"]}.
        pictures: folder that picture names are relative to; by default the table's own. Names must stay inside.
        archives: folder of tars, whole or in parts, that hold the pictures instead; names are paths inside them, or
            the ends of such where they are unique.
        spool: where gzipped archives are decompressed to plain tars, once; by default `.spool` in `archives`.
        origin: where the records come from; by default the table's name.
        licence: their licence.
    """

    path: str = ""
    layout: str = "edit"
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    pictures: str = ""
    archives: str = ""
    spool: str = ""
    origin: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        columns_of(self.layout, self.columns)
        if self.pictures and self.archives:
            raise InputError("source.pictures and source.archives are both set; the pictures can be in one of them")

    def units(self, records: int) -> Iterator[Unit]:
        """Ranges of rows, file by file."""
        if self.pictures and not Path(self.pictures).is_dir():
            raise InputError(f"source.pictures {self.pictures} is no folder; picture names are relative to it")
        if self.archives:
            grouped(Path(self.archives))
        return ranges(self.path, records, columns_of(self.layout, self.columns))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a range of rows."""
        table = table_of(self.path, unit)
        reader = RowReader(columns_of(self.layout, self.columns), table, self.origin, self.licence)
        root = Path(self.pictures) if self.pictures else table.parent
        by_name = partial(read_image, root.resolve())
        for item in read_rows(table, unit.where):
            yield from reader.records(item, Archives(self.archives, self.spool).read if self.archives else by_name)


@dataclass
class Chat(Manifest):
    """Rows of {"conversations": [{"from", "value"}], "image(s)": ...} or {"messages": [{"role", "content"}], ...}.

    A picture stands where a text has `<image>`; where texts have none, all pictures come before the first user text.
    """

    layout: str = "chat"


def ranges(path: str, records: int, columns: Columns) -> Iterator[Unit]:
    """Ranges of rows of a table or of a folder of tables, file by file."""
    suffixes = (*SUFFIXES, ".txt") if columns.kind == "prompt" else SUFFIXES
    root = existing_path(path, f"a table ({', '.join(suffixes)}) or a folder of such")
    files = sorted(f for f in root.iterdir() if f.is_file()) if root.is_dir() else [root]
    files = [file for file in files if file.suffix.lower() in suffixes]
    if not files:
        raise InputError(f"source.path {root} is or holds no table; expected {', '.join(suffixes)}")
    found = False
    for file in files:
        try:
            for unit in table_units(file, records):
                found = True
                yield unit
        except OSError as error:
            raise InputError(f"source.path {file} cannot be read: {error.strerror}; check its permissions") from error
    if not found:
        raise InputError(f"source.path {root} is empty; expected one row for each record")


def table_of(path: str, unit: Unit) -> Path:
    """The file that a range lies in."""
    return Path(path) / unit.where["file"] if Path(path).is_dir() else Path(path)


@dataclass(frozen=True)
class RowReader:
    """Makes records of the rows of one table."""

    columns: Columns
    table: Path
    origin: str
    licence: str

    def records(self, item: Row | Rejected, by_name: ByName) -> list[Record | Rejected]:
        """What a row holds: one record, or one for each turn of an editing session; `by_name` reads its pictures."""
        if isinstance(item, Rejected):
            return [item]
        number, row = item
        try:
            turns = sessions(row, self.columns)
        except RowError as error:
            return [self._rejected(number, "missing_field", str(error))]
        return [self._record(number, turn, fields, by_name) for turn, fields in enumerate(turns)]

    def _record(self, number: int, turn: int, row: Mapping[str, Any], by_name: ByName) -> Record | Rejected:
        try:
            found = draft(row, self.columns)
        except RowError as error:
            reason = "bad_conversation" if self.columns.kind == "chat" else "missing_field"
            return self._rejected(number, reason, str(error))
        images: list[EncodedImage] = []
        for picture in found.pictures:
            image = read_picture(picture, by_name)
            if isinstance(image, tuple):
                return self._rejected(number, *image)
            images.append(image)
        names = [name for name in map(picture_name, found.pictures) if name]
        table = printable(self.table.name)
        # The place makes a key unique: rows that say the same are found by their content, over all shards at once.
        place = digest(self.table.name, number, turn, found.text)[:16]
        key = f"{slug(Path(names[-1]).stem)[:40] if names else ''}-{place}".lstrip("-")
        return found.record(key, tuple(images), self.origin or table, self.licence, row=number, files=names)

    def _rejected(self, number: int, reason: str, detail: str) -> Rejected:
        return Rejected(f"line-{number}", reason, f"{printable(self.table.name)} line {number}: {detail}")
