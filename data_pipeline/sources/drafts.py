"""Rows that fit their layout: text and pictures told apart, the pictures unread."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline.records import (
    EditRecord,
    EncodedImage,
    PreferenceRecord,
    PromptRecord,
    ReasoningRecord,
    Record,
    TextImageRecord,
)
from data_pipeline.sources.conversations import RowError, Turns, conversation, marked
from data_pipeline.sources.layouts import PROVENANCE, Columns

MAX_FACT = 4000  # characters of JSON of a column that is carried along as metadata
SPLITS = {"": "", "train": "train", "val": "val", "validation": "val"}


@dataclass(frozen=True)
class Draft:
    """What a record will be. Pictures are paths, URLs, bytes or {"bytes": ..., "path": ...}: the sources, then the
    target or the chosen one, then the rejected one."""

    kind: str
    text: str
    pictures: tuple[Any, ...] = ()
    turns: Turns = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    origin: str = ""
    split: str = ""

    def record(self, key: str, images: tuple[EncodedImage, ...], origin: str, licence: str, **facts: Any) -> Record:
        """The record, with its pictures read; origin and licence are for rows that state none."""
        common = (self.origin or origin, self.licence or licence, self.split, {**self.metadata, **facts})
        match self.kind:
            case "edit":
                return EditRecord(key, images[:-1], images[-1], self.text, *common)
            case "prompt":
                return PromptRecord(key, self.text, images, *common)
            case "preference":
                return PreferenceRecord(key, self.text, images[-2], images[-1], images[:-2], *common)
            case "reasoning":
                return ReasoningRecord(key, images, self.turns, *common)
        return TextImageRecord(key, images[-1], self.text, *common)


def sessions(row: Mapping[str, Any], columns: Columns) -> list[Mapping[str, Any]]:
    """The rows of a row: itself, or one for each turn of an editing session (metadata: "turn")."""
    found = _first(row, columns.turns) if columns.kind != "chat" else None
    if found is None:
        return [row]
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        raise RowError(f"{columns.turns[0]} must be a list of turns")
    stated = {name for role in PROVENANCE for name in columns.named.get(role, ())}
    shared = {**_facts(row, columns), **{name: row[name] for name in stated & row.keys()}}
    return [{**shared, **turn, "turn": number} for number, turn in enumerate(found)]


def draft(row: Mapping[str, Any], columns: Columns) -> Draft:
    """What a row says, or RowError."""
    stated = {role: _stated(row, columns.named.get(role, ())) for role in PROVENANCE}
    if stated["split"] not in SPLITS:
        raise RowError(f"the split is {stated['split'][:40]!r}, expected train or val")
    split = SPLITS[stated["split"]]
    return replace(_content(row, columns), licence=stated["licence"], origin=stated["origin"], split=split)


def _stated(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """A text or number of a row, "" where it has none."""
    found = _first(row, names)
    if not isinstance(found, str | int | None):
        raise RowError(f"expected a text in {_named(names)}, got a {type(found).__name__}")
    return "" if found is None else str(found).strip()


def _content(row: Mapping[str, Any], columns: Columns) -> Draft:
    """The text and the pictures of a row."""
    sources = tuple(picture for name in columns.sources for picture in _pictures(row.get(name)))
    metadata = _facts(row, columns)
    if columns.kind == "chat":
        turns, pictures = conversation(_found(row, columns, "turns"), sources)
        return Draft("reasoning", "", _checked(pictures), turns, metadata)
    text = _found(row, columns, "text")
    if isinstance(text, list) and text and all(isinstance(t, str) for t in text):
        metadata["texts"], text = text, text[0]
    if not isinstance(text, str):
        raise RowError(f"expected a text in {_named(columns.text)}, got a {type(text).__name__}")
    text = text.strip()
    if columns.kind == "reasoning":
        answer = _found(row, columns, "answer")
        if not isinstance(answer, str | int | float) or not str(answer).strip():
            raise RowError(f"expected a text or number in {_named(columns.answer)}")
        said = marked((("user", text), ("assistant", str(answer))), len(sources))
        return Draft("reasoning", text, sources, said, {**metadata, "answer": str(answer)})
    ends = [_picture(row, columns, role) for role in ("target", "rejected") if role in columns.named]
    if columns.kind == "edit" and not sources:
        raise RowError(f"expected a picture in {_named(columns.sources)}, {_got(row)}")
    kind = columns.kind if columns.kind != "mixed" else "edit" if sources else "text_image"
    return Draft(kind, text, (*sources, *ends), (), metadata)


def _picture(row: Mapping[str, Any], columns: Columns, role: str) -> Any:
    """The one picture of a role."""
    found = _pictures(_first(row, columns.named[role]))
    if len(found) != 1:
        raise RowError(f"expected a picture in {_named(columns.named[role])}, {_got(row)}")
    return found[0]


def _pictures(value: Any) -> tuple[Any, ...]:
    """A column's pictures: none, one or a list of them."""
    listed = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    return _checked(tuple(listed))


def _checked(pictures: tuple[Any, ...]) -> tuple[Any, ...]:
    for picture in pictures:
        if not isinstance(picture, str | bytes) and not (isinstance(picture, Mapping) and "bytes" in picture):
            raise RowError("a picture must be a path, or an object with bytes")
    return pictures


def _facts(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The remaining columns that are plain and short: scores, tasks, ids, what a verifier is to look for."""
    single = ((name for name in names if row.get(name) is not None) for names in columns.named.values())
    taken = {*columns.sources, *(next(names, "") for names in single)}
    return {name: value for name, value in row.items() if name not in taken and value is not None and _plain(value)}


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value in few characters; a NaN is no number."""
    if isinstance(value, str):
        return len(value) <= MAX_FACT
    if isinstance(value, float):
        return math.isfinite(value)
    try:
        return isinstance(value, int | list | dict) and len(json.dumps(value, allow_nan=False)) <= MAX_FACT
    except (ValueError, TypeError):  # not finite; bytes, dates and other types of Parquet
        return False


def _found(row: Mapping[str, Any], columns: Columns, role: str) -> Any:
    found = _first(row, columns.named[role])
    if found is None:
        raise RowError(f"expected {_named(columns.named[role])}, {_got(row)}")
    return found


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _named(names: tuple[str, ...]) -> str:
    return " or ".join(names)


def _got(row: Mapping[str, Any]) -> str:
    return f"got the fields {sorted(map(str, row))}"
