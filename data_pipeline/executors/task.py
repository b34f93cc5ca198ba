"""One task: a unit of a source, through the steps, into one shard. Everything an executor needs to know of content."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data_pipeline.errors import InputError
from data_pipeline.index import sidecar
from data_pipeline.manifest import SHARD, check_types
from data_pipeline.records import Record, Rejected
from data_pipeline.shards import Scored, atomic_write, write_shard
from data_pipeline.sources.protocol import Source, Unit, digest

EXAMPLES = 5  # rejections of a reason that a report quotes
REPORT: dict[str, type] = {"seen": int, "stages": list, "kept": dict, "passed": dict, "rejected": dict, "ledger": list}
LEDGER: dict[str, type] = dict.fromkeys(("key", "stage", "reason", "detail"), str)
Item = Scored | Rejected
Work = Callable[[Any], dict[str, Any]]  # what an executor does with each task


class MapStep(Protocol):
    """Judges or changes one record."""

    def __call__(self, record: Record) -> Record | Rejected:
        """The record, itself or changed, or why it goes no further."""


@runtime_checkable
class ScoreStep(Protocol):
    """Scores records in batches of `batch_size`; columns are named and typed, with the scorer's id and revision."""

    batch_size: int

    def columns(self) -> list[pa.Field]:
        """Names and types, with the scorer's id and revision as metadata."""

    def score(self, records: Sequence[Record]) -> list[Mapping[str, Any]]:
        """A value for every column of each record; None where nothing can be measured."""


@runtime_checkable
class BatchStep(Protocol):
    """Judges or changes records in batches of `batch_size`, in their order; scores already taken stay theirs."""

    batch_size: int

    def rewrite(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Each record, itself or changed, or why it goes no further."""


Step = MapStep | ScoreStep | BatchStep


@dataclass(frozen=True)
class Task:
    """A unit and where it stands in the source; its name follows from input and recipe, so equal work is known."""

    number: int
    unit: Unit
    recipe: str

    @property
    def stem(self) -> str:
        """The name of all its files, in the source's order."""
        return f"{self.number:06d}-{digest(self.recipe, self.unit.content, self.unit.where)[:12]}"

    def __str__(self) -> str:
        return self.unit.name


@dataclass
class Funnel:
    """How many records each stage let through, and why not the others; the first stage is the source."""

    stages: list[str]
    seen: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by "stage: reason"
    examples: dict[str, list[str]] = field(default_factory=dict)
    ledger: list[dict[str, str]] = field(default_factory=list)

    def reject(self, stage: str, rejected: Rejected) -> None:
        """Counts a rejection and enters it in the ledger."""
        self.rejected[f"{stage}: {rejected.reason}"] += 1
        self.ledger.append({"key": rejected.key, "stage": stage, "reason": rejected.reason, "detail": rejected.detail})

    def stage(self, name: str, items: Iterable[Item]) -> Iterator[Scored]:
        """What a stage lets through."""
        for item in items:
            if isinstance(item, Rejected):
                self.reject(name, item)
            else:
                self.passed[name] += 1
                yield item


def damage(output: Path, shard: dict[str, Any]) -> str:
    """What is wrong with a finished shard, or nothing; looks at sizes only."""
    path = output / shard["name"]
    if not path.is_file() or not sidecar(path).is_file():
        return f"{path.name} or its index is missing"
    size = path.stat().st_size
    return "" if size == shard["bytes"] else f"{path.name} has {size} bytes, expected {shard['bytes']}"


def finished(output: Path, task: Task) -> dict[str, Any] | None:
    """A task's report, if its mark and its whole shard are there."""
    report = read_report(output, task)
    return None if report is None or (report["shard"] and damage(output, report["shard"])) else report


def read_report(output: Path, task: Task) -> dict[str, Any] | None:
    """A task's report; None where there is none, or none that a task wrote."""
    try:
        report: dict[str, Any] = json.loads((output / f"{task.stem}.task.json").read_bytes())
        check_types(report, REPORT)
        for name in ("kept", "passed", "rejected"):
            check_types(report[name], dict.fromkeys(report[name], int))
        for entry in report["ledger"]:
            check_types(entry, LEDGER)
        if report.get("shard") is not None:
            check_types(report["shard"], SHARD)
        return {"shard": None, **report}
    except (OSError, ValueError):
        return None


def run_task(task: Task, source: Source, steps: Sequence[Step], output: Path) -> dict[str, Any]:
    """Reads the unit, applies the steps, writes OUTPUT/<stem>.tar with its index and, last of all, <stem>.task.json.

    The task file is the mark that the task is finished; it holds the funnel's counts and the ledger of rejections. A
    task that is finished is not done again: its report may have been lost with the worker that made it.
    """
    if report := finished(output, task):
        return report
    names = [f"{type(step).__name__} {number}" for number, step in enumerate(steps, 1)]
    funnel = Funnel(["source", *names])
    kinds: Counter[str] = Counter()
    stream = funnel.stage("source", counted(source.read(task.unit), funnel))
    for name, step in zip(names, steps, strict=True):
        items = batched(step, stream) if isinstance(step, ScoreStep | BatchStep) else mapped(step, stream)
        stream = funnel.stage(name, items)
    shard = write_shard(output / f"{task.stem}.tar", tallied(stream, kinds), score_columns(steps))
    report = {
        "unit": task.unit.name,
        "stages": funnel.stages,
        "shard": shard,
        "seen": funnel.seen,
        "kept": dict(sorted(kinds.items())),
        "passed": {name: funnel.passed[name] for name in funnel.stages},
        "rejected": dict(sorted(funnel.rejected.items())),
        "ledger": funnel.ledger,
    }
    data = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False).encode()
    atomic_write(output / f"{task.stem}.task.json", data)
    return report


def score_columns(steps: Sequence[Step]) -> list[pa.Field]:
    """The columns that steps add to the index."""
    return [column for step in steps if isinstance(step, ScoreStep) for column in step.columns()]


def counted(items: Iterable[Record | Rejected], funnel: Funnel) -> Iterator[Item]:
    """What the source yields, counted; records begin without scores."""
    for item in items:
        funnel.seen += 1
        yield item if isinstance(item, Rejected) else (item, {})


def mapped(step: Callable[[Record], Record | Rejected], items: Iterable[Scored]) -> Iterator[Item]:
    """One record at a time."""
    for record, scores in items:
        result = step(record)
        yield result if isinstance(result, Rejected) else (result, scores)


def batched(step: ScoreStep | BatchStep, items: Iterable[Scored]) -> Iterator[Item]:
    """Batches that never cross a task, so that what a batch holds does not depend on workers."""
    if step.batch_size < 1:  # none at a time would lose them all
        raise InputError(f"batch_size of {type(step).__name__} is {step.batch_size}; expected at least 1")
    items = iter(items)
    while batch := list(islice(items, step.batch_size)):
        yield from score_batch(step, batch) if isinstance(step, ScoreStep) else rewrite_batch(step, batch)


def score_batch(step: ScoreStep, batch: list[Scored]) -> Iterator[Item]:
    """The batch with the step's scores added."""
    found = step.score([record for record, _ in batch])
    for (record, before), scores in zip(batch, found, strict=True):
        yield record, {**before, **scores}


def rewrite_batch(step: BatchStep, batch: list[Scored]) -> Iterator[Item]:
    """The batch as the step changed it."""
    found = step.rewrite([record for record, _ in batch])
    for result, (_, scores) in zip(found, batch, strict=True):
        yield result if isinstance(result, Rejected) else (result, scores)


def tallied(items: Iterable[Scored], kinds: Counter[str]) -> Iterator[Scored]:
    """Records counted by kind and split."""
    for record, scores in items:
        kinds[f"{record.kind}/{record.split or 'unsplit'}"] += 1
        yield record, scores
