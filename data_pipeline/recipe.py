"""A recipe: a source, its steps and the size of the shards, read from configs/data/*.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
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
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    fields = {"source", "steps", "records_per_shard"}
    if not isinstance(content, dict) or set(content) - fields or "source" not in content:
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"recipe {path}: expected the fields source, steps and records_per_shard, got {got}")
    source = configured(content["source"], "source", overrides)
    if not isinstance(source, Iterable):
        raise InputError(f"recipe {path}: {content['source']['class_path']} is no source; see data_pipeline.sources")
    listed = content.get("steps") or []
    if not isinstance(listed, list):
        raise InputError(f"recipe {path}: steps is {listed!r}; expected a list, each with a class_path")
    steps = [configured(step, f"steps.{i}") for i, step in enumerate(listed)]
    for spec, step in zip(listed, steps, strict=True):
        if not callable(step):
            raise InputError(f"recipe {path}: {spec['class_path']} is no step; see data_pipeline.steps")
    size = content.get("records_per_shard", 4096)
    if type(size) is not int or size < 1:
        raise InputError(f"recipe {path}: records_per_shard is {size!r}; expected a whole number of at least 1")
    return Recipe(source, steps, size)


def configured(spec: Any, name: str, overrides: Sequence[str] = ()) -> Any:
    """Builds {"class_path": ..., "init_args": {...}}, type-checked, with dotted overrides."""
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise InputError(f"{name} must have a class_path, such as data_pipeline.sources.Folder; got {spec!r}")
    unknown = sorted(map(str, set(spec) - {"class_path", "init_args"}))
    if unknown:
        raise InputError(f"{name}: expected the fields class_path and init_args, got also {unknown}")
    class_path = spec["class_path"]
    cls = allowed_class(class_path, name)
    parser = ArgumentParser(exit_on_error=False, prog="data_pipeline build")
    parser.add_class_arguments(cls, name.replace(".", "_"))
    try:
        config = parser.parse_object({name.replace(".", "_"): spec.get("init_args") or {}})
        config = parser.parse_args(list(overrides), namespace=config) if overrides else config
        return parser.instantiate(config)[name.replace(".", "_")]
    except InputError:
        raise
    except Exception as error:  # jsonargparse reports a user's mistake by several types
        raise InputError(f"{name} ({class_path}): {' '.join(str(error).split())}") from error


def allowed_class(class_path: str, name: str) -> type:
    """A dataclass of this package by its path; the prefix is checked before anything is imported."""
    module, _, attribute = class_path.rpartition(".")
    if not class_path.startswith(ALLOWED):
        raise InputError(f"{name}.class_path is {class_path}; it must start with {ALLOWED}")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}.class_path {class_path} does not exist: {error}") from error
    # A module also holds the names it imports; only classes written here may be built from a file.
    if not (isinstance(cls, type) and is_dataclass(cls) and cls.__module__.startswith(ALLOWED)):
        raise InputError(f"{name}.class_path {class_path} is no class of this package that a recipe can build")
    return cls
