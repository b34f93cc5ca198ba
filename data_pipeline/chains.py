"""Chains of thought as text: where the thinking ends, and what the answer is. Standard library only, and no pattern
that a hostile text could slow down."""

from __future__ import annotations

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
BOXES = ("\\boxed", "\\fbox")
# What introduces an answer that stands in no box; the last one counts.
PHRASE = re.compile(r"(?:final answer|answer|ответ|答案)\s{0,4}(?:is|[:=：]|是|为)\s{0,4}[:：]?\s{0,4}", re.IGNORECASE)
LONGEST_PHRASED = 200  # characters of an answer in plain words


class Chain(NamedTuple):
    """A text in its parts: `thought` between the marks, `said` after them; `closed` says whether the thinking ended."""

    thought: str
    said: str
    closed: bool


def split(text: str) -> Chain:
    """The parts of what a model wrote after its template's `<think>`, or with one of its own.

    >>> split("<think>two and two</think>It is \\\\boxed{4}.")
    Chain(thought='two and two', said='It is \\\\boxed{4}.', closed=True)
    """
    thought, mark, said = text.rpartition(CLOSE)
    if not mark:
        opened = text.find(OPEN)
        return Chain(text[opened + len(OPEN) :], "", False) if opened >= 0 else Chain("", text, False)
    return Chain(thought.partition(OPEN)[2] if OPEN in thought else thought, said, True)


def boxes(text: str) -> list[tuple[int, str]]:
    """Where each outermost box begins, and what is in it, with braces balanced; a box that never closes is none."""
    found: list[tuple[int, str]] = []
    place = 0
    while (start := min((at for name in BOXES if (at := text.find(name, place)) >= 0), default=-1)) >= 0:
        opened = start + len(next(name for name in BOXES if text.startswith(name, start)))
        while opened < len(text) and text[opened] == " ":
            opened += 1
        end = closing(text, opened)
        if end is None:
            word = re.compile(r"[\w.+-]+").match(text, opened)  # \boxed 5
            if word:
                found.append((start, word.group()))
            # An unclosed brace swallows all that follows: no later box can be told from it.
            if opened < len(text) and text[opened] == "{":
                return found
            place = word.end() if word else opened + 1
        else:
            found.append((start, text[opened + 1 : end].strip()))
            place = end + 1
    return found


def closing(text: str, opened: int) -> int | None:
    """The brace that closes the one at `opened`."""
    if opened >= len(text) or text[opened] != "{":
        return None
    depth, place = 0, opened
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1  # \{ and \} are no braces
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
        place += 1
    return None


def final_answer(text: str) -> str | None:
    """The answer of a text: what is in the last box after the thinking, or what follows "answer is"; None without.

    Several boxes on the last line that has any are one answer of several parts, so that guesses in a row are not each
    an answer of its own.

    >>> final_answer("<think>\\\\boxed{1}?</think>Both \\\\boxed{\\\\frac{1}{2}} and \\\\boxed{3}")
    '\\\\frac{1}{2}, 3'
    """
    said = split(text).said
    found = boxes(said)
    if found:
        last = said.rfind("\n", 0, found[-1][0])
        return ", ".join(dict.fromkeys(content for start, content in found if start > last)) or None
    phrases = list(PHRASE.finditer(said))
    if not phrases:
        return None
    line = said[phrases[-1].end() :].strip().partition("\n")[0][: LONGEST_PHRASED + 1]
    line = re.sub(r"[.。]\s*$", "", re.split(r"[.。!?]\s+(?=[A-Z])", line)[0]).strip().strip("*").strip()
    return line if 0 < len(line) <= LONGEST_PHRASED else None
