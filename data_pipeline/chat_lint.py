"""What training would leave out of conversations, found before it begins: named by reason, counted, with an example."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.chat import is_turn, scores_of, sizes
from data_pipeline.chat_plan import SET
from data_pipeline.errors import InputError
from data_pipeline.index import TEXT_FIELDS, load_index, read_member

MARK = "<image>"
ROLES = ("system", "user", "assistant")
# Of turns and the pictures' (height, width): why a model's layout refuses them, reason and detail; None if it does not.
Refused = Callable[[list[tuple[str, str]], list[tuple[int, int]]], tuple[str, str] | None]


def faults(
    folder: Path,
    numbers: Sequence[str] = (),
    present: Sequence[str] = (),
    seen: bool = False,
    refused: Refused | None = None,
    asked: bool = False,
) -> Iterator[str]:
    """A line for each reason for which conversations of a folder of shards would not be trained on.

    Args:
        folder: of shards.
        numbers: scores that each must have, for data.minimum and iterations.
        present: what else the metadata of each must hold, such as the "answer" that a verifier compares with.
        seen: whether each must show a picture, because a projector alone learns.
        refused: what a model's tokenizer can tell, where it is here: reserved tokens, more tokens than the context.
        asked: whether conversations are asked, and not learned from: their last answers, if any, are not looked at.
    """
    found: dict[str, list[str]] = {}
    total, scores = 0, scores_of(folder)
    for record in load_index(folder):
        if record.kind != SET:
            continue
        total += 1
        try:
            facts = json.loads(read_member(record, "json"))
            metadata = {**(facts.get("metadata") or {}), **scores.get(record.sample_id, {})}
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or no object of it
            found.setdefault("unreadable", []).append(f"{record.key} ({str(error)[:80]})")
            continue
        pictures = sum(name not in TEXT_FIELDS for name in record.members)
        own = [*fault(facts.get("turns"), pictures, seen, asked)]
        if refused is not None and not own and (why := refused([(r, t) for r, t in facts["turns"]], sizes(record))):
            own.append(why)
        own += lacking(metadata, numbers, present)
        for reason, detail in own:
            found.setdefault(reason, []).append(f"{record.key} ({detail})")
    for reason, each in found.items():
        yield f"{len(each)} of {total} conversations: {reason}, such as {each[0]}"


def fault(turns: Any, pictures: int, seen: bool = False, asked: bool = False) -> Iterator[tuple[str, str]]:
    """Why a conversation cannot be laid out, by the names that the layout gives: `networks.layout.LayoutError`.

    What only a tokenizer can tell is not found here.
    """
    if not isinstance(turns, list) or not all(is_turn(turn) for turn in turns):
        yield "no turns", "expected a list of role and text"
        return
    if asked and turns and turns[-1][0] == "assistant":
        turns = turns[:-1]
    if unknown := [role for role, _ in turns if role not in ROLES]:
        yield "unknown role", f"{str(unknown[0])[:40]!r} is none of {', '.join(ROLES)}"
    if not asked and not any(role == "assistant" for role, _ in turns):
        yield "no answer", "no turn of an assistant"
    elif not asked and not all(text.strip() for role, text in turns if role == "assistant"):
        yield "empty answer", "an assistant says nothing"
    if any(MARK in text for role, text in turns if role == "assistant"):
        yield "picture in an answer", f"an answer holds {MARK}"
    marks = sum(text.count(MARK) for _, text in turns)
    if marks != pictures:
        yield "missing picture", f"{marks} marks {MARK} for {pictures} pictures"
    elif seen and not pictures:
        yield "no picture", "the projector learns nothing from words alone"


def lacking(metadata: Mapping[str, Any], numbers: Sequence[str], present: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a record's metadata and scores do not hold."""
    for name in numbers:
        if type(metadata.get(name)) not in (int, float):
            note = metadata.get(f"{name}_note")
            yield f"without a number {name}", str(note)[:80] if note else f"{name} is {metadata.get(name)!r}"[:80]
    for name in present:
        if metadata.get(name) in (None, ""):
            yield f"without {name}", "its metadata do not hold it"
