"""Tables in every format, and whatever a source yields: what the tests of sources share."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.protocol import Source


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows in the format of the file's extension."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=2))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case suffix:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
    return str(path)


def read(source: Source, records: int = 4096) -> list[Any]:
    """Records and rejections of a whole source."""
    return [item for unit in source.units(records) for item in source.read(unit)]
