"""GenEval's verdicts on detected objects (Ghosh et al. 2023, arXiv 2310.11513), and softer ones that RL learns from.

The scoring logic alone, on boxes whoever found them; with another detector than the official one the numbers are not
comparable to published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """What counts as detected, the most confident first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ranked = {name: sorted(each, key=lambda d: -d.confidence) for name, each in found.items()}
    return {name: [d for d in each if d.confidence > least][:MAX_OBJECTS] for name, each in ranked.items()}


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies from `b`: any of "left of", "right of", "above", "below".

    The distance of the centres on each axis, less a margin of both boxes' sizes, must be more than half of the whole
    distance; nothing where the boxes are too near on both axes.
    """
    found: set[str] = set()
    offset, beyond = [0.0, 0.0], [0.0, 0.0]
    for axis in (0, 1):
        size = abs(a.box[axis + 2] - a.box[axis]) + abs(b.box[axis + 2] - b.box[axis])
        offset[axis] = (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2
        beyond[axis] = max(0.0, abs(offset[axis]) - POSITION_MARGIN * size) * (1 if offset[axis] > 0 else -1)
    if max(map(abs, beyond)) < 1e-3:
        return found
    distance = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    for share, lower, upper in ((beyond[0], "left of", "right of"), (beyond[1], "above", "below")):
        if abs(share / distance) > 0.5:
            found.add(upper if share > 0 else lower)
    return found


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
            relation, other = clause["position"]
            anchors = matched[other]
            fits = anchors is not None and all(relation in relations(d, anchor) for d in group for anchor in anchors)
        matched.append(group if fits else None)
        right = right and fits
    excluded = (len(objects.get(clause["class"], [])) >= clause["count"] for clause in metadata.get("exclude", ()))
    return right and not any(excluded)


def strict(metadata: Mapping[str, Any], found: Found) -> bool:
    """Correct, and exactly as many of each class as asked for."""
    objects = confident(found, metadata.get("tag", ""))
    exact = all(len(objects.get(c["class"], [])) == c["count"] for c in metadata.get("include", ()))
    return exact and correct(metadata, found)


def soft(metadata: Mapping[str, Any], found: Found) -> float:
    """Flow-GRPO's reward: the mean over clauses of 1 - |wanted - found| / wanted, of counts and of colours, and 1 or 0
    for positions; 0 for colour and position where the count is wrong.

    As in its server, what a position refers to must itself be as wanted. Its server lets terms fall below 0, and adds a
    1 beside the 0 of a failed position, which halves instead of zeroing it; neither is done here.
    """
    objects = confident(found, metadata.get("tag", ""))
    scores: list[float] = []
    groups: list[list[Detection]] = []
    for clause in metadata.get("include", ()):
        group, wanted = objects.get(clause["class"], []), clause["count"]
        scores.append(max(0.0, 1 - abs(wanted - len(group)) / wanted))
        right = len(group) == wanted
        if "color" in clause:
            coloured = sum(d.colour == clause["color"] for d in group)
            scores.append(max(0.0, 1 - abs(wanted - coloured) / wanted) if right else 0.0)
            right = right and coloured == wanted
        if "position" in clause:
            relation, other = clause["position"]
            anchors = groups[other]
            there = bool(anchors) and all(relation in relations(d, anchor) for d in group for anchor in anchors)
            right = right and there
            scores.append(float(right))
        groups.append(group if right else [])
    return sum(scores) / len(scores) if scores else 0.0
