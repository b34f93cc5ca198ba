"""A build: claims its output folder, runs the tasks that are missing, and closes with a manifest."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from data_pipeline.errors import InputError
from data_pipeline.executors.task import EXAMPLES, Step, Task, Work, damage, finished, read_report, run_task
from data_pipeline.index import sidecar
from data_pipeline.manifest import MANIFEST, RECIPE, read_manifest
from data_pipeline.progress import progress
from data_pipeline.shards import atomic_write
from data_pipeline.sources.protocol import Source

VERSION = 2
OURS = re.compile(r"\d{6,}-[0-9a-f]{12}\.(tar|index\.parquet|task\.json)|\..+\.tmp")  # what tasks write
BUDGET_AFTER = 1000  # records seen before the share of rejections can stop a build


class Executor(Protocol):
    """Where tasks run."""

    def run(self, tasks: Sequence[Any], work: Work) -> Iterator[dict[str, Any]]:
        """The reports of all tasks, as they finish. Both are pickled, and a task that was cut off comes again."""


def build(
    source: Source,
    steps: Sequence[Step],
    output: Path,
    records_per_shard: int,
    settings: dict[str, Any],
    executor: Executor,
    max_rejected: float = 1.0,
) -> dict[str, Any]:
    """Builds the shards of `output` and returns its manifest.

    Each task commits on its own, so a build that was stopped at any moment goes on where it stood, and the bytes are
    those of an undisturbed one. A finished build of the same recipe is left as it is; other content is never touched.

    Args:
        max_rejected: share of rejected records above which the build stops, once it has seen a thousand; those of an
            interrupted build count.
    """
    output = Path(output)
    recipe = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
    if found := claimed(output, recipe):
        return {**found, "reused": True}
    check_apart(source, output)
    fingerprint = json.dumps(recipe, sort_keys=True)
    units = progress(source.units(records_per_shard), None, "parts of the source")
    tasks = [Task(number, unit, fingerprint) for number, unit in enumerate(units)]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            if found := claimed(output, recipe):  # by another process, while the source was listed
                return {**found, "reused": True}
            atomic_write(output / RECIPE, json.dumps(recipe, indent=1, sort_keys=True).encode())
            budget, missing = Budget(max_rejected), []
            for task in tasks:
                if report := finished(output, task):
                    budget.spend(report)
                else:
                    missing.append(task)
            work = partial(run_task, source=source, steps=steps, output=output.resolve())  # workers may be elsewhere
            reports = executor.run(missing, work)
            budget.check(output, tasks)
            for report in progress(reports, len(missing), "tasks"):
                budget.spend(report)
                budget.check(output, tasks)
            return conclude(output, tasks, recipe)
    except Timeout as error:
        raise InputError(f"--output {output} is being built by another process; wait for it or stop it") from error


def check_apart(source: Source, output: Path) -> None:
    """Refuses an output inside what the source reads: built again, it would read its own shards."""
    for name in ("path", "pictures", "archives"):
        folder = Path(getattr(source, name, "") or output / "none")
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"--output {output} lies inside source.{name} {folder}, which is read; choose a folder elsewhere"
            )


def claimed(output: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of this very recipe; None where it is unfinished or the folder free."""
    if not output.exists() or (output.is_dir() and all(path.name == ".lock" for path in output.iterdir())):
        return None
    if not output.is_dir() or not (output / RECIPE).is_file():
        raise InputError(f"--output {output} holds something that is no build; choose a new folder")
    try:
        same = json.loads((output / RECIPE).read_bytes()) == recipe
    except ValueError as error:
        raise InputError(f"{output / RECIPE} is damaged: {error}; choose a new folder") from error
    if not same:
        raise InputError(f"--output {output} holds the build of another recipe; choose a new folder, or remove it")
    if not (output / MANIFEST).is_file():
        return None
    found = read_manifest(output)
    for shard in found["shards"]:
        problem = damage(output, shard)
        if problem:
            raise InputError(f"--output {output} holds a damaged build: {problem}; choose a new folder")
    return found


def conclude(output: Path, tasks: Sequence[Task], recipe: dict[str, Any]) -> dict[str, Any]:
    """Writes and returns the manifest, once nothing is left but what it names."""
    manifest = {"version": VERSION, "recipe": recipe, **merged(output, tasks)}
    remove_leftovers(output, tasks, manifest)
    if not manifest["shards"]:
        raise InputError(f"no record survived; {output}/*.task.json say why of each. {summary(manifest)}")
    atomic_write(output / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return manifest


def remove_leftovers(output: Path, tasks: Sequence[Task], manifest: dict[str, Any]) -> None:
    """Removes what killed workers left, and the shards of tasks whose input has changed since an interrupted build."""
    tars = [output / shard["name"] for shard in manifest["shards"]]
    ours = {f"{task.stem}.task.json" for task in tasks} | {path.name for tar in tars for path in (tar, sidecar(tar))}
    for path in output.iterdir():
        if OURS.fullmatch(path.name) and path.name not in ours:
            path.unlink(missing_ok=True)


def merged(output: Path, tasks: Sequence[Task]) -> dict[str, Any]:
    """The reports of all finished tasks as one, in the source's order."""
    totals: dict[str, Counter[str]] = {name: Counter() for name in ("kept", "passed", "rejected")}
    shards: list[dict[str, Any]] = []
    examples: dict[str, list[str]] = {}
    seen, stages = 0, ["source"]
    for task in tasks:
        report = read_report(output, task)
        if report is None:
            continue
        seen += report["seen"]
        stages = report["stages"]
        for name, total in totals.items():
            total.update(report[name])
        for entry in report["ledger"]:
            listed = examples.setdefault(f"{entry['stage']}: {entry['reason']}", [])
            if len(listed) < EXAMPLES:
                listed.append(f"{entry['key']}: {entry['detail']}")
        if report["shard"]:
            shards.append(report["shard"])
    counts = {name: dict(sorted(total.items())) for name, total in totals.items()}
    return {"seen": seen, "stages": stages, **counts, "examples": dict(sorted(examples.items())), "shards": shards}


@dataclass
class Budget:
    """How many of the records seen were rejected, against the share that may be."""

    share: float
    seen: int = 0
    rejected: int = 0

    def spend(self, report: dict[str, Any]) -> None:
        """Counts a task's records."""
        self.seen += report["seen"]
        self.rejected += sum(report["rejected"].values())

    def check(self, output: Path, tasks: Sequence[Task]) -> None:
        """Stops a build that rejects too much, and says what to look at."""
        if self.seen >= BUDGET_AFTER and self.rejected > self.share * self.seen:
            raise InputError(
                f"{self.rejected} of {self.seen} records were rejected, more than max_rejected {self.share:g} allows; "
                f"finished shards are kept in {output}. Look at the reasons, then mend the input or raise "
                f"--max_rejected:\n{summary(merged(output, tasks))}"
            )


def summary(manifest: dict[str, Any]) -> str:
    """The survival report in words: how many came in, went out of each stage, and why the others did not."""
    kept = ", ".join(f"{count} {name}" for name, count in manifest["kept"].items()) or "none"
    lines = [f"records seen {manifest['seen']}, kept {kept}"]
    for stage in manifest["stages"]:
        lines.append(f"  {stage}: {manifest['passed'].get(stage, 0)} went on")
        for reason, count in manifest["rejected"].items():
            if reason.startswith(f"{stage}: "):
                lines.append(f"    rejected {count}: {reason.removeprefix(f'{stage}: ')}")
                lines += [f"      {example}" for example in manifest["examples"][reason]]
    return "\n".join(lines)
