"""A recipe: a source, its steps and the size of the shards, read from configs/data/*.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from data_pipeline.errors import InputError
from data_pipeline.executors.local import build

ALLOWED = "data_pipeline."  # a recipe names our classes only: an import of anything else could run anything


@dataclass
class Recipe:
    """A source and steps, ready to run. `settings` is all that decides the output."""

    source: Any
    steps: list[Any] = field(default_factory=list)
    records_per_shard: int = 4096

    @property
    def settings(self) -> dict[str, Any]:
        """What the output depends on, as plain data."""
        parts = [self.source, *self.steps]
        described = [{"class": f"{type(part).__module__}.{type(part).__qualname__}", **asdict(part)} for part in parts]
        return {"source": described[0], "steps": described[1:], "records_per_shard": self.records_per_shard}

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings."""
        return hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:12]

    def build(self, output: Path) -> dict[str, Any]:
        """Runs the recipe and returns the manifest."""
        return build(self.source, self.steps, output, self.records_per_shard, self.settings)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are dotted options of the source ("--source.path", "pictures")."""
    if not Path(path).is_file():
        raise InputError(f"there is no recipe {path}; the recipes are in configs/data")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) - {"source", "steps", "records_per_shard"} or "source" not in content:
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"recipe {path}: expected the fields source, steps and records_per_shard, got {got}")
    source = configured(content["source"], "source", overrides)
    steps = [configured(step, f"steps.{i}") for i, step in enumerate(content.get("steps") or [])]
    size = content.get("records_per_shard", 4096)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"recipe {path}: records_per_shard is {size!r}; expected a whole number of at least 1")
    return Recipe(source, steps, size)


def configured(spec: Any, name: str, overrides: Sequence[str] = ()) -> Any:
    """Builds {"class_path": ..., "init_args": {...}}, type-checked, with dotted overrides."""
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise InputError(f"{name} must have a class_path, such as data_pipeline.sources.Folder; got {spec!r}")
    class_path = spec["class_path"]
    module, _, qualname = class_path.rpartition(".")
    if not class_path.startswith(ALLOWED):
        raise InputError(f"{name}.class_path is {class_path}; it must start with {ALLOWED}")
    try:
        cls = getattr(import_module(module), qualname)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}.class_path {class_path} does not exist: {error}") from error
    parser = ArgumentParser(exit_on_error=False, prog="data_pipeline build")
    parser.add_class_arguments(cls, name.replace(".", "_"))
    try:
        config = parser.parse_object({name.replace(".", "_"): spec.get("init_args") or {}})
        config = parser.parse_args(list(overrides), namespace=config) if overrides else config
        return parser.instantiate(config)[name.replace(".", "_")]
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - jsonargparse reports a user's mistake by several types
        raise InputError(f"{name} ({class_path}): {error}") from error
