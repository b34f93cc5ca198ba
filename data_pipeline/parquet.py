"""Parquet as indexes and selections are kept in: pages carry checksums, and a damaged file is named."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import InputError

AGAIN = "build or index it again"


def encoded(table: pa.Table) -> bytes:
    """A table as a file's bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def read(path: Path, columns: Sequence[str] | None = None, remedy: str = AGAIN, **options: Any) -> pa.Table:
    """Columns of a file; InputError where it is damaged or lacks one."""
    try:
        names = None if columns is None else list(columns)
        return pq.read_table(path, columns=names, page_checksum_verification=True, **options)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise damaged(path, error, remedy) from error


def schema(path: Path, remedy: str = AGAIN) -> pa.Schema:
    """A file's columns and what it says of itself."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error, remedy) from error


def damaged(path: Path, error: Exception, remedy: str) -> InputError:
    """What a user is told of a file that cannot be read."""
    what = " ".join(str(error).partition(" in ")[0].split())
    return InputError(f"{path} is damaged or of an older version, {remedy}: {what}")
