"""Rounds of self-distillation in an experiment: shards that the run before makes, for the next run to learn from."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import InputError
from lightning_modules.commands import RUNS


@dataclass(frozen=True)
class Round:
    """A recipe whose generator is the run before (AL-CoTD, arXiv 2504.05599: before stage 1 and each iteration).

    Attributes:
        recipe: of configs/data.
        take: its field that takes the export of the run before.
        into: the field of the run's config that takes the folder of shards, as a list of one.
        set: values by dotted name in the recipe; numbers count in lists: {steps.0.init_args.control.alpha: 0.5}.
    """

    recipe: Path
    take: str = "steps.0.init_args.generator.init_args.pretrained"
    into: str = "data.init_args.shards"
    set: dict[str, Any] = field(default_factory=dict)

    def made(self, export: str) -> dict[str, Any]:
        """The recipe with all that is changed in it."""
        content = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        for dotted, value in {**self.set, self.take: export}.items():
            put(content, dotted, deepcopy(value), self.recipe)
        return content


def folder_of(name: str, recipe: dict[str, Any]) -> Path:
    """Where a recipe's shards lie: a name for all that decides them."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return RUNS / "rounds" / name / digest


def put(content: Any, dotted: str, value: Any, recipe: Path) -> None:
    """Sets a field that is there by its dotted name."""
    *path, last = dotted.split(".")
    try:
        for key in path:
            content = content[int(key)] if isinstance(content, list) else content[key]
        content[int(last) if isinstance(content, list) else last] = value
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{recipe} has no field {dotted}: {type(error).__name__} {error}") from error
