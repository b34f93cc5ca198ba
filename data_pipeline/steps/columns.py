"""Score columns: a value is worth nothing without who measured it."""

from __future__ import annotations

import pyarrow as pa


def column(name: str, kind: pa.DataType, scorer: str, revision: str) -> pa.Field:
    """A column of the index with its scorer's id and revision as metadata: other scorers' thresholds do not apply."""
    return pa.field(name, kind, metadata={"scorer": scorer, "revision": revision})
