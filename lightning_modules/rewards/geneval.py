"""GenEval's verdicts on detected objects (Ghosh et al. 2023, arXiv 2310.11513), and softer ones that RL learns from.

The scoring logic alone, on boxes whoever found them; with another detector than the official one the numbers are not
comparable to published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's confidence, and for the tag "counting"
MAX_OBJECTS = 16  # of a class, the most confident
POSITION_MARGIN = 0.1  # of both boxes' sizes, that centres must be apart by


@dataclass(frozen=True)
class Detection:
    """An object of a class.

    Attributes:
        box: left, top, right, bottom in pixels.
        confidence: in [0, 1].
        colour: one of COLOURS, "" where it was not looked at.
    """

    box: tuple[float, float, float, float]
    confidence: float
    colour: str = ""


Found = Mapping[str, Sequence[Detection]]  # by class


def confident(found: Found, tag: str) -> dict[str, list[Detection]]:
    """What counts as detected, the most confident first, and of equals the one that was named last, as officially.

    Compared in single precision, as there: a detector's 0.3 is not above the threshold of 0.3.
    """
    least = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    ranked = {name: sorted(each, key=lambda d: d.confidence)[::-1] for name, each in found.items()}
    return {name: [d for d in each if np.float32(d.confidence) > least][:MAX_OBJECTS] for name, each in ranked.items()}


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies from `b`: any of "left of", "right of", "above", "below".

    The distance of the centres on each axis, less a margin of both boxes' sizes, must be more than half of the whole
    distance; nothing where the boxes are too near on both axes. In single precision, as in the official code.
    """
    ours, theirs = (np.asarray(each.box, np.float32) for each in (a, b))
    offset = (ours[:2] + ours[2:]) / 2 - (theirs[:2] + theirs[2:]) / 2
    size = abs(ours[2:] - ours[:2]) + abs(theirs[2:] - theirs[:2])
    beyond = (abs(offset) - POSITION_MARGIN * size).clip(min=0) * np.sign(offset)
    if beyond.max() < 1e-3 and beyond.min() > -1e-3:
        return set()
    across, down = beyond / np.linalg.norm(offset)
    there = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in there.items() if holds}


def correct(metadata: Mapping[str, Any], found: Found) -> bool:
    """The benchmark's own verdict: each clause has at least its count, colours and positions, and nothing is excluded.

    Args:
        metadata: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, number of a clause]}],
            "exclude"?: [{"class", "count"}]}.
        found: what was detected.
    """
    objects = confident(found, metadata.get("tag", ""))
    matched: list[list[Detection] | None] = []
    right = True
    for clause in metadata.get("include", ()):
        group = objects.get(clause["class"], [])[: clause["count"]]
        fits = len(group) == clause["count"]
        if fits and "color" in clause:
            fits = sum(d.colour == clause["color"] for d in group) >= clause["count"]
        # A wrong colour leaves the position unjudged, as in the official code.
        if fits and "position" in clause:
            fits = place(group, clause["position"], matched) == "right"
        matched.append(group if fits else None)
        right = right and fits
    excluded = (len(objects.get(clause["class"], [])) >= clause["count"] for clause in metadata.get("exclude", ()))
    return right and not any(excluded)


def strict(metadata: Mapping[str, Any], found: Found) -> bool:
    """Correct, and exactly as many of each class as asked for.

    Flow-GRPO's server does not look at what is excluded; GenEval excludes only what exact counts exclude too.
    """
    objects = confident(found, metadata.get("tag", ""))
    exact = all(len(objects.get(c["class"], [])) == c["count"] for c in metadata.get("include", ()))
    return exact and correct(metadata, found)


Place = Literal["right", "wrong", "alone"]


class Outcome(NamedTuple):
    """How far a clause is fulfilled that must be so exactly.

    Attributes:
        number: 1 - |wanted - found| / wanted, which falls below 0 where more than twice as many are found.
        colour: the same of objects in the colour asked for; None where the count is wrong, or none is asked for.
        position: None where the count or the colour is wrong, or none is asked for; "alone" where what it refers to
            is itself not as wanted.
    """

    number: float
    colour: float | None
    position: Place | None


def outcomes(metadata: Mapping[str, Any], found: Found) -> list[Outcome]:
    """Of each clause; colours and positions are judged only where the count is right."""
    objects = confident(found, metadata.get("tag", ""))
    outcome: list[Outcome] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        group, wanted = objects.get(clause["class"], []), clause["count"]
        number = 1 - abs(wanted - len(group)) / wanted
        colour: float | None = None
        position: Place | None = None
        if number == 1 and "color" in clause:
            colour = 1 - abs(wanted - sum(d.colour == clause["color"] for d in group)) / wanted
        right = number == 1 and colour in (None, 1)
        if right and "position" in clause:
            position = place(group, clause["position"], groups)
        groups.append(group if right and position in (None, "right") else None)
        outcome.append(Outcome(number, colour, position))
    return outcome


def place(group: Sequence[Detection], wanted: tuple[str, int], groups: Sequence[Sequence[Detection] | None]) -> Place:
    """Whether all of a group lie as wanted, (relation, number of a clause), from all of an earlier group."""
    relation, other = wanted
    anchors = groups[other]
    if anchors is None:
        return "alone"
    return "right" if all(relation in relations(d, anchor) for d in group for anchor in anchors) else "wrong"


def soft(metadata: Mapping[str, Any], found: Found) -> float:
    """Flow-GRPO's reward without its server's oddities: the mean over clauses of 1 - |wanted - found| / wanted of
    counts and of colours, not below 0, and 1 or 0 for positions; 0 for what is not judged because the rest is wrong.
    """
    terms: list[float] = []
    for clause, outcome in zip(metadata.get("include", ()), outcomes(metadata, found), strict=True):
        terms.append(max(0.0, outcome.number))
        if "color" in clause:
            terms.append(max(0.0, outcome.colour or 0.0))
        if "position" in clause:
            terms.append(float(outcome.position == "right"))
    return sum(terms) / len(terms) if terms else 0.0


def flow_grpo(metadata: Mapping[str, Any], found: Found) -> float:
    """Flow-GRPO's reward as its server gives it ("scores" of yifan123/reward-server), for runs that must equal it.

    There terms fall below 0; a wrong count leaves one 0 for colour and position together; a wrong colour leaves the
    position out; and a wrong position leaves a 0 and a 1.
    """
    terms: list[float] = []
    for clause, (number, colour, position) in zip(metadata.get("include", ()), outcomes(metadata, found), strict=True):
        terms.append(number)
        if number != 1:
            terms += [0.0] if "color" in clause or "position" in clause else []
            continue
        terms += [] if colour is None else [colour]
        if position is not None:
            terms += {"alone": [0.0], "wrong": [0.0, 1.0], "right": [1.0]}[position]
    return sum(terms) / len(terms) if terms else 0.0
