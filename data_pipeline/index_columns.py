"""All sidecar indexes of a folder as columns, and single records out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline import parquet
from data_pipeline.errors import InputError
from data_pipeline.index import COLUMNS, SCHEMA, IndexedRecord, place_of, records_of, shard_of
from data_pipeline.progress import progress
from data_pipeline.sources.folder import EXTENSIONS

PLAIN = ("kind", "split", "origin", "licence")
PICTURES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)


@dataclass(frozen=True)
class Index:
    """The sidecars as columns.

    Of R records: `table` (PLAIN, sample_id, text_length and scores), `file`, the number of the sidecar, and `row`, the
    first in it. Of P pictures: `owner`, the number of the record, `width` and `height`, 0 where unknown.
    """

    listed: Sequence[Path]
    table: pa.Table
    file: np.ndarray
    row: np.ndarray
    owner: np.ndarray
    width: np.ndarray
    height: np.ndarray
    size: int
    scorers: dict[str, str]


def read_index(listed: Sequence[Path]) -> Index:
    """All sidecars, column by column: no object is made for a record."""
    parts: list[pa.Table] = []
    first: list[np.ndarray] = []
    pictures: list[tuple[np.ndarray, ...]] = []
    scorers: dict[str, set[str]] = {}
    records = size = 0
    for path in progress(listed, len(listed), "indexes"):
        rows, schema = read_sidecar(path)
        for field in schema:
            if field.name not in SCHEMA.names:
                named = [
                    (field.metadata or {}).get(key, b"").decode(errors="replace") for key in (b"scorer", b"revision")
                ]
                scorers.setdefault(field.name, set()).add(" ".join(filter(None, named)) or "no scorer named")
        ids = rows["sample_id"].to_numpy()
        begins = np.ones(len(ids), bool)
        begins[1:] = ids[1:] != ids[:-1]  # members of a record are adjacent
        drawn = pc.is_in(pc.utf8_lower(rows["extension"]), pa.array(PICTURES)).to_numpy()
        sides = (pc.fill_null(rows[name], 0).to_numpy()[drawn] for name in ("width", "height"))
        pictures.append(((records + np.cumsum(begins) - 1)[drawn], *sides))
        parts.append(rows.filter(pa.array(begins)).drop(["extension", "size", "width", "height"]))
        first.append(np.flatnonzero(begins))
        records += len(first[-1])
        size += pc.sum(rows["size"]).as_py() or 0
    try:
        table = pa.concat_tables(parts, promote_options="permissive").unify_dictionaries()
    except pa.ArrowException as error:
        raise InputError(f"the indexes of {listed[0].parent} do not fit together: {error}; build again") from error
    file = np.repeat(np.arange(len(first)), [len(rows) for rows in first])
    owner, width, height = (np.concatenate(column) for column in zip(*pictures, strict=True))
    named_by = {name: "; ".join(sorted(found)) for name, found in scorers.items()}
    return Index(listed, table, file, np.concatenate(first), owner, width, height, size, named_by)


def read_sidecar(path: Path) -> tuple[pa.Table, pa.Schema]:
    """A sidecar's rows without what only a reader of the tar needs, repeated texts as numbers; and its schema."""
    unneeded = {"key", "text_sha256", "pictures_sha256", "field", "offset", "sha256"}
    schema = parquet.schema(path)
    if absent := set(SCHEMA.names) - set(schema.names):
        raise InputError(f"{path} is no index, it has no {', '.join(sorted(absent))}; build the shards again")
    wanted = [name for name in schema.names if name not in unneeded]
    rows = parquet.read(path, wanted, read_dictionary=list(PLAIN))
    return rows.cast(pa.schema([field.remove_metadata() for field in rows.schema])), schema


def load(index: Index, numbers: np.ndarray) -> dict[int, IndexedRecord]:
    """Records by number, and no others."""
    found: dict[int, IndexedRecord] = {}
    files = np.unique(index.file[numbers]).tolist()
    for file in progress(files, len(files), "shards"):
        path = index.listed[file]
        table = parquet.read(path, COLUMNS)
        facts = table.schema.metadata or {}
        shard, place = shard_of(path, facts), place_of(facts)
        ends = np.append(index.row[index.file == file], table.num_rows)
        for i in numbers[index.file[numbers] == file].tolist():
            start = index.row[i]
            rows = table.slice(start, ends[np.searchsorted(ends, start) + 1] - start).to_pylist()
            (found[i],) = records_of(rows, shard, place)
    return found
