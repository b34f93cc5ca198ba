"""Conversations about pictures: LLaVA's and ShareGPT's `conversations`, and `messages` as chat APIs have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = "<image>"

Turns = tuple[tuple[str, str], ...]


class RowError(ValueError):
    """A row that does not fit its layout: a field is missing or of another type."""


def conversation(said: Any, pictures: Sequence[Any]) -> tuple[Turns, tuple[Any, ...]]:
    """The turns of a list of {"from", "value"} or {"role", "content"}, and the pictures in the order of their marks.

    Args:
        said: the list.
        pictures: those named beside the list; else they are inside it, as parts of its contents.
    """
    if not isinstance(said, list) or not all(isinstance(turn, Mapping) for turn in said):
        raise RowError("expected a list of turns")
    inline: list[Any] = []
    turns = tuple(_turn(turn, inline) for turn in said)
    if inline and pictures:
        raise RowError("pictures are named both inside the turns and beside them")
    if {"user", "assistant"} - {role for role, _ in turns}:
        raise RowError("expected a user's turn and an assistant's")
    shown = tuple(pictures or inline)
    return marked(turns, len(shown)), shown


def marked(turns: Turns, pictures: int) -> Turns:
    """Turns with one mark `<image>` for each picture; where none has any, all stand before the first user text."""
    marks = sum(text.count(MARK) for _, text in turns)
    if marks == pictures:
        return turns
    if marks:
        raise RowError(f"{marks} marks {MARK} for {pictures} pictures")
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    return (*turns[:first], ("user", MARK * pictures + turns[first][1]), *turns[first + 1 :])


def _turn(turn: Mapping[str, Any], inline: list[Any]) -> tuple[str, str]:
    """Role and text of a turn; pictures inside its content go to `inline`, a mark to their place."""
    role = ROLES.get(str(turn.get("from") or turn.get("role")))
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if role is None:
        raise RowError(f"the role {str(turn.get('from') or turn.get('role'))[:40]!r} is none of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise RowError("a turn's content must be a text or a list of parts")
    return role, "".join(_part(part, inline) for part in content)


def _part(part: Mapping[str, Any], inline: list[Any]) -> str:
    """The text of a part of a turn, or the mark of its picture."""
    match part.get("type"):
        case "text" if isinstance(part.get("text"), str):
            return part["text"]
        case "image" | "image_url":
            found = part.get("image") or part.get("image_url")
            if found is not None:  # else it is named beside the turns
                inline.append(found["url"] if isinstance(found, Mapping) and "url" in found else found)
            return MARK
    raise RowError(f"a part of type {str(part.get('type'))[:40]!r} is neither text nor image")
