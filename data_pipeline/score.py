"""Scores of records that are in shards already: their indexes gain columns, and no tar is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from data_pipeline import parquet
from data_pipeline.endpoint import plain
from data_pipeline.errors import InputError
from data_pipeline.executors.build import Executor
from data_pipeline.executors.task import EXAMPLES, ScoreStep, batched, score_columns
from data_pipeline.index import (
    SUFFIX,
    TEXT_FIELDS,
    IndexedRecord,
    read_member,
    read_prompt,
    records_in,
    sidecars,
    with_scores,
)
from data_pipeline.progress import progress
from data_pipeline.records import EncodedImage, Record, Rejected, record_from
from data_pipeline.shards import Scored, atomic_write
from data_pipeline.steps.decode import Decode

LIMITS = Decode(min_side=1, max_text=1 << 20)  # what a build or an index let in may still not decode
FIELD_ID = b"PARQUET:field_id"  # which reading adds to the metadata of a field


def score(folder: Path, steps: Sequence[ScoreStep], executor: Executor) -> str:
    """Adds the columns of `steps` to the indexes of a folder of shards, or of tars elsewhere; returns counts as text.

    Each index is replaced at once, so that scoring that was stopped goes on where it stood. Columns that are there by
    the same scorer and revision are kept, those of another are replaced, all others stay as they are. A record that
    does not decode has null scores.
    """
    folder = Path(folder).resolve()  # workers may be elsewhere
    listed = sidecars(folder)
    with_scores(score_columns(steps))  # a column named twice is refused before anything is read
    try:
        with FileLock(folder / ".lock", timeout=0):
            for leftover in folder.glob(f".*{SUFFIX}.*.tmp"):  # of workers that were killed
                leftover.unlink()
            tasks = [path for path in listed if missing(parquet.schema(path), steps)]
            reports = executor.run(tasks, partial(score_shard, steps=steps))
            found = list(progress(reports, len(tasks), "shards"))
    except Timeout as error:
        raise InputError(f"{folder} is being built or scored by another process; wait for it or stop it") from error
    return summary(found, len(listed))


def missing(schema: pa.Schema, steps: Sequence[ScoreStep]) -> list[ScoreStep]:
    """The steps of which an index does not have every column, of this type and by this scorer and revision."""
    there = {field.name: field for field in map(bare, schema)}
    return [
        step
        for step in steps
        if not all(c.name in there and there[c.name].equals(c, check_metadata=True) for c in step.columns())
    ]


def bare(field: pa.Field) -> pa.Field:
    """A field as it was before it was written."""
    metadata = {name: value for name, value in (field.metadata or {}).items() if name != FIELD_ID}
    return field.with_metadata(metadata or None)


def score_shard(path: Path, steps: Sequence[ScoreStep]) -> dict[str, Any]:
    """Scores the records of one index and replaces it; batches never cross it, so its bytes depend on nothing else."""
    table = parquet.read(path)
    table = table.cast(pa.schema(map(bare, table.schema), table.schema.metadata))
    wanted = missing(table.schema, steps)
    unread: list[Rejected] = []
    stream: Iterator[Any] = readable(path, unread)
    for step in wanted:
        stream = batched(step, stream)
    scores = {record.key: found for record, found in stream}
    keys = table["key"].to_pylist()
    for column in score_columns(wanted):
        values = pa.array([scores.get(key, {}).get(column.name) for key in keys], column.type)
        place = table.schema.get_field_index(column.name)
        table = table.append_column(column, values) if place < 0 else table.set_column(place, column, values)
    atomic_write(path, parquet.encoded(table))
    examples = [f"{path.name}: {item.key}: {item.reason}: {item.detail}" for item in unread[:EXAMPLES]]
    return {"scored": len(scores), "unread": len(unread), "examples": examples}


def readable(path: Path, unread: list[Rejected]) -> Iterator[Scored]:
    """The records of an index that decode; the others are entered in `unread`."""
    for record in records_in(path):
        found = LIMITS(loaded(record))
        if isinstance(found, Rejected):
            unread.append(found)
        else:
            yield found, {}


def loaded(record: IndexedRecord) -> Record:
    """A record with its pictures, compared with their hashes where the index has them."""
    images = {
        name: EncodedImage(read_member(record, name, verify=True), member.extension)
        for name, member in record.members.items()
        if name not in TEXT_FIELDS
    }
    facts = json.loads(read_member(record, "json", verify=True)) if "json" in record.members else {}
    if not {"kind", "metadata"} <= facts.keys():  # by others: the index knows the kind and where the text is
        text = read_prompt(record, verify=True)
        facts = {"kind": record.kind, "metadata": facts, **dict.fromkeys(("caption", "instruction", "prompt"), text)}
    return record_from(record.key, facts, images)


def summary(reports: Sequence[dict[str, Any]], shards: int) -> str:
    """Counts over all indexes."""
    scored, unread = (sum(report[name] for report in reports) for name in ("scored", "unread"))
    lines = [f"{scored:,} records of {len(reports)} shards scored; {shards - len(reports)} had these columns before"]
    if unread:
        examples = [line for report in reports for line in report["examples"]]
        lines += [f"{unread:,} do not decode, their scores are null:", *(f"  {line}" for line in examples[:EXAMPLES])]
    return "\n".join(lines)


def unscored(folder: Path) -> str:
    """How many records of a folder have no score, and the commonest reasons: what columns `*_note` say."""
    notes: dict[str, Counter[str]] = {}
    records = 0
    for path in sidecars(folder):
        names = [name for name in parquet.schema(path).names if name.endswith("_note")]
        table = parquet.read(path, [*names, "field"])
        table = table.filter(pc.is_in(table["field"], pa.array(TEXT_FIELDS)))
        records += table.num_rows
        for name in names:
            notes.setdefault(name, Counter()).update(table[name].drop_null().to_pylist())
    lines = []
    for name, found in sorted(notes.items()):
        if found:
            lines.append(f"{found.total():,} of {records:,} records have no score, {name} says why:")
            lines += [f"  {count:,} x {plain(note)[:200]}" for note, count in found.most_common(EXAMPLES)]
    return "\n".join(lines)
