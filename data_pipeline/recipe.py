"""A recipe: a source, its steps and the size of the shards, read from configs/data/*.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from data_pipeline.errors import InputError
from data_pipeline.executors.build import Executor, build
from data_pipeline.executors.local import Local
from data_pipeline.executors.task import BatchStep, ScoreStep, score_columns
from data_pipeline.index import with_scores
from data_pipeline.select import Selection

ALLOWED = ("data_pipeline.", "lightning_modules.pipelines.")  # our classes only: any other import could run anything
FIELDS = ("source", "steps", "records_per_shard", "max_rejected")


@dataclass
class Recipe:
    """A source and steps, ready to run. `settings` is all that decides the output."""

    source: Any
    steps: list[Any] = field(default_factory=list)
    records_per_shard: int = 4096
    max_rejected: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What the output depends on, as plain data."""
        steps = [described(step) for step in self.steps]
        return {"source": described(self.source), "steps": steps, "records_per_shard": self.records_per_shard}

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings."""
        return hashlib.sha256(repr(sorted(self.settings.items())).encode()).hexdigest()[:12]

    def build(self, output: Path, executor: Executor = Local()) -> dict[str, Any]:  # noqa: B008
        """Runs the recipe and returns the manifest."""
        with_scores(score_columns(self.steps))  # a column named twice is refused before anything is read
        size, settings = self.records_per_shard, self.settings
        return build(self.source, self.steps, output, size, settings, executor, self.max_rejected)


def read_yaml(path: Path) -> Any:
    """The content of a file of configs/data."""
    if not Path(path).is_file():
        raise InputError(f"there is no recipe {path}; the recipes are in configs/data")
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error


def load_selection(path: Path | None, overrides: Sequence[str] = ()) -> Selection:
    """Reads rules; `overrides` are dotted ("--rules.where", "[words >= 3]")."""
    rules = read_yaml(path) if path else {}
    return configured({"class_path": "data_pipeline.select.Selection", "init_args": rules}, "rules", overrides)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are dotted options of the source ("--source.path", "pictures")."""
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) - set(FIELDS) or "source" not in content:
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        score = "; to score shards that are there: python -m data_pipeline score FOLDER -c RECIPE"
        hint = score if got == ["steps"] else ""
        raise InputError(f"recipe {path}: expected the fields {', '.join(FIELDS)}, got {got}{hint}")
    source = configured(content["source"], "source", overrides)
    if not hasattr(source, "units"):
        raise InputError(f"recipe {path}: {content['source']['class_path']} is no source; see data_pipeline.sources")
    steps = load_steps(path, content)
    size = content.get("records_per_shard", 4096)
    if type(size) is not int or size < 1:
        raise InputError(f"recipe {path}: records_per_shard is {size!r}; expected a whole number of at least 1")
    budget = share_of_rejected(content.get("max_rejected", 1.0), f"recipe {path}: max_rejected")
    return Recipe(source, steps, size, budget)


def load_scoring(path: Path) -> list[ScoreStep]:
    """The steps of a recipe that score, in their order; the others made records, which are there."""
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) - set(FIELDS):
        raise InputError(f"recipe {path}: expected the fields {', '.join(FIELDS)}, of which score reads steps")
    found = [step for step in load_steps(path, content) if isinstance(step, ScoreStep)]
    if not found:
        raise InputError(f"recipe {path} has no step that scores; take one as configs/data/score_edit.yaml")
    return found


def load_steps(path: Path, content: dict[str, Any]) -> list[Any]:
    """The steps of a recipe."""
    listed = content.get("steps") or []
    if not isinstance(listed, list):
        raise InputError(f"recipe {path}: steps is {listed!r}; expected a list, each with a class_path")
    steps = [configured(step, f"steps.{i}") for i, step in enumerate(listed)]
    for spec, step in zip(listed, steps, strict=True):
        if not (callable(step) or isinstance(step, ScoreStep | BatchStep)):
            raise InputError(f"recipe {path}: {spec['class_path']} is no step; see data_pipeline.steps")
    return steps


def share_of_rejected(value: Any, name: str) -> float:
    """An error budget, from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; expected a share from 0 to 1")
    return float(value)


def described(part: Any) -> Any:
    """Class and settings of a source, a step or a model in it as plain data; of a model also which weights it holds.

    Fields that equality leaves out (an endpoint's address) decide nothing of the output.
    """
    if not is_dataclass(part):
        return part
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    weights = {"fingerprint": part.fingerprint} if hasattr(part, "fingerprint") else {}
    return {"class": name, **{f.name: described(getattr(part, f.name)) for f in fields(part) if f.compare}, **weights}


def configured(spec: Any, name: str, overrides: Sequence[str] = ()) -> Any:
    """Builds {"class_path": ..., "init_args": {...}}, type-checked, with dotted overrides."""
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise InputError(f"{name} must have a class_path, such as data_pipeline.sources.Folder; got {spec!r}")
    unknown = sorted(map(str, set(spec) - {"class_path", "init_args"}))
    if unknown:
        raise InputError(f"{name}: expected the fields class_path and init_args, got also {unknown}")
    if not isinstance(spec.get("init_args") or {}, dict):
        raise InputError(f"{name}: expected settings by their names, got {spec['init_args']!r}")
    class_path = spec["class_path"]
    cls = allowed_class(class_path, name)
    check_nested(cls, spec.get("init_args"), name)
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


def check_nested(cls: type, settings: Any, name: str) -> None:
    """Checks the class paths of models inside settings, before anything imports them."""
    hints = get_type_hints(cls)
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if not getattr(hints.get(key), "_is_protocol", False):
            continue
        if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
            raise InputError(f"{name}.{key} is a model; expected class_path and init_args, got {value!r}")
        inner = allowed_class(value["class_path"], f"{name}.{key}")
        check_nested(inner, value.get("init_args"), f"{name}.{key}")


def allowed_class(class_path: str, name: str) -> type:
    """A dataclass of this package by its path; the prefix is checked before anything is imported."""
    module, _, attribute = class_path.rpartition(".")
    if not class_path.startswith(ALLOWED):
        raise InputError(f"{name}.class_path is {class_path}; it must start with {' or '.join(ALLOWED)}")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}.class_path {class_path} does not exist: {error}") from error
    # A module also holds the names it imports; only classes written here may be built from a file.
    if not (isinstance(cls, type) and is_dataclass(cls) and cls.__module__.startswith(ALLOWED)):
        raise InputError(f"{name}.class_path {class_path} is no class of this package that a recipe can build")
    return cls
