"""Runs a source and its steps in this process, once, and writes the shards."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.index import sidecar
from data_pipeline.records import Record, Rejected
from data_pipeline.shards import MANIFEST, ShardWriter, atomic_write, read_manifest

Step = Callable[[Record], Record | Rejected]
EXAMPLES = 5  # rejections of a reason that the manifest quotes
VERSION = 1


@dataclass
class Survival:
    """How many records came in and went out, by kind and split, and why the others did not."""

    seen: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, record: Record) -> None:
        """Counts a record that was written."""
        self.kept[f"{record.kind}/{record.split or 'unsplit'}"] += 1

    def reject(self, rejected: Rejected) -> None:
        """Counts a rejection and keeps its first examples."""
        self.rejected[rejected.reason] += 1
        examples = self.examples.setdefault(rejected.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{rejected.key}: {rejected.detail}")


def survivors(source: Iterable[Record | Rejected], steps: Sequence[Step], survival: Survival) -> Iterable[Record]:
    """Records that come through every step, each key once."""
    keys: set[str] = set()
    for item in source:
        survival.seen += 1
        for step in steps:
            if isinstance(item, Rejected):
                break
            item = step(item)
        if not isinstance(item, Rejected) and item.key in keys:
            item = Rejected(item.key, "duplicate_record", "an equal record came before")
        if isinstance(item, Rejected):
            survival.reject(item)
            continue
        keys.add(item.key)
        survival.keep(item)
        yield item


def build(
    source: Iterable[Record | Rejected],
    steps: Sequence[Step],
    output: Path,
    records_per_shard: int,
    recipe: dict[str, Any],
) -> dict[str, Any]:
    """Builds the shards of `output` and returns its manifest.

    All or nothing: shards are made in a folder beside `output`, which is renamed when complete. A finished build of the
    same recipe is left as it is; any other content is never overwritten (InputError).
    """
    output = Path(output)
    done = finished(output, recipe)
    if done is not None:
        return {**done, "reused": True}
    output.parent.mkdir(parents=True, exist_ok=True)
    survival = Survival()
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".partial", dir=output.parent) as partial:
        with ShardWriter(Path(partial) / "shards", records_per_shard) as writer:
            for record in survivors(source, steps, survival):
                writer.write(record)
        manifest = {
            "version": VERSION,
            "recipe": recipe,
            "seen": survival.seen,
            "kept": dict(sorted(survival.kept.items())),
            "rejected": dict(sorted(survival.rejected.items())),
            "examples": dict(sorted(survival.examples.items())),
            "shards": writer.shards,
        }
        if not writer.shards:
            raise InputError(f"no record survived, nothing was written to {output}. {summary(manifest)}")
        data = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False).encode()
        atomic_write(Path(partial) / "shards" / MANIFEST, data)
        if output.exists():
            output.rmdir()  # empty, as `finished` saw; fails rather than lose what came since
        (Path(partial) / "shards").rename(output)
    return manifest


def finished(output: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of this very recipe; None where there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = output / MANIFEST
    if not output.is_dir() or not manifest.is_file():
        raise InputError(f"--output {output} holds something that is no build; choose a new folder")
    found = read_manifest(output)
    if found["recipe"] != json.loads(json.dumps(recipe)):  # a tuple comes back from JSON as a list
        raise InputError(f"--output {output} holds the build of another recipe; choose a new folder, or remove it")
    for shard in found["shards"]:
        path = output / shard["name"]
        size = path.stat().st_size if path.is_file() and sidecar(path).is_file() else None
        if size != shard["bytes"]:
            state = "or its index is missing" if size is None else f"has {size} bytes, expected {shard['bytes']}"
            raise InputError(f"--output {output} holds a damaged build: {path.name} {state}; choose a new folder")
    return found


def leftovers(output: Path) -> list[Path]:
    """Unfinished folders beside `output`: of builds that were killed, or that run now."""
    return sorted(Path(output).parent.glob(f".{Path(output).name}.*.partial"))


def summary(manifest: dict[str, Any]) -> str:
    """The survival report in words: how many came in, went out, and why the others did not."""
    kept = ", ".join(f"{count} {name}" for name, count in manifest["kept"].items()) or "none"
    lines = [f"records seen {manifest['seen']}, kept {kept}"]
    for reason, count in manifest["rejected"].items():
        lines.append(f"  rejected {count}: {reason}")
        lines += [f"    {example}" for example in manifest["examples"][reason]]
    return "\n".join(lines)
