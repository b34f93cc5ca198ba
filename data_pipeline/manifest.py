"""What a finished build says of itself in manifest.json, checked before anything relies on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError

MANIFEST = "manifest.json"  # of a finished build
RECIPE = "recipe.json"  # of any build
FIELDS: dict[str, type] = {"recipe": dict, "kept": dict, "rejected": dict, "examples": dict, "shards": list}
SHARD: dict[str, type] = {"name": str, "sha256": str, "bytes": int, "records": int}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build."""
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_types(found, FIELDS)
        for shard in found["shards"]:
            check_types(shard, SHARD)
        for name in ("kept", "rejected"):
            check_types(found[name], dict.fromkeys(found[name], int))
        check_types(found["examples"], dict.fromkeys(found["examples"], list))
    except ValueError as error:
        raise InputError(f"{path} is not the manifest of a build: {error}; choose another folder") from error
    return found


def check_types(found: Any, expected: Mapping[str, type]) -> None:
    """ValueError where an object lacks a field or has one of another type."""
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {json.dumps(found)[:40]}")
    wrong = [name for name, kind in expected.items() if type(found.get(name)) is not kind]
    if wrong:
        raise ValueError(f"it has no {', '.join(f'{name} ({expected[name].__name__})' for name in wrong)}")


def built_shards(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What a build says of each shard; None where there was none, an InputError where it is unfinished."""
    if (folder / MANIFEST).is_file():
        return {shard["name"]: shard for shard in read_manifest(folder)["shards"]}
    if (folder / RECIPE).is_file():
        raise InputError(f"{folder} holds an unfinished build; run the same build command again, it goes on")
    return None


def check_built(folder: Path, found: set[str]) -> None:
    """Compares the tars of a folder with those of its build: what an interrupted one left must not be trained on."""
    shards = built_shards(folder)
    built = found if shards is None else set(shards)
    if strangers := sorted(found - built):
        raise InputError(
            f"{folder / strangers[0]} is none of the {len(built)} shards in {MANIFEST}; remove it, or move it to "
            "a folder of its own"
        )
    if missing := sorted(built - found):
        raise InputError(f"{folder / missing[0]} is missing, {MANIFEST} names it; build the shards again")
