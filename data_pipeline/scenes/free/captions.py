"""Canvases to words, and whether a canvas is what a caption says: places by side, or of one object to another."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

from data_pipeline.scenes.captions import RELATIONS, Clause, join, noun
from data_pipeline.scenes.free.world import MAX_OBJECTS, Canvas, Placed, allowed, random_canvas, random_object

SIDES = {"on the left": (0, -1), "on the right": (0, 1), "at the top": (1, -1), "at the bottom": (1, 1)}
DRAWN, JUDGED = 1 / 3, 0.4  # how much of a picture a side is, when it is spoken of and when it is looked for
BETWEEN = {"drawn": 14, "judged": 6}  # pixels between two centres of which one is left of, or above, the other


@dataclass(frozen=True)
class FreeCaption:
    """A text and its meaning: clauses, a side for each (None: open), and a relation of the first two objects."""

    text: str
    task: str
    clauses: tuple[Clause, ...]
    sides: tuple[str | None, ...]
    relation: str | None = None
    background: str | None = None


def on_side(canvas: Canvas, o: Placed, side: str, share: float) -> bool:
    """Whether an object's centre lies in that share of the picture at a side."""
    axis, direction = SIDES[side]
    place = o.centre[axis] / (canvas.width, canvas.height)[axis]
    return place < share if direction < 0 else place > 1 - share


def related(first: Placed, second: Placed, relation: str, pixels: int) -> bool:
    """Whether `first` is, say, left of `second` by so many pixels, from centre to centre."""
    (x1, y1), (x2, y2) = first.centre, second.centre
    gap = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[relation]
    return gap >= pixels


def satisfied(caption: FreeCaption, canvas: Canvas | None) -> bool:
    """Whether the canvas holds exactly the objects that the caption speaks of, where it says."""
    slots = [c for c in zip(caption.clauses, caption.sides, strict=True) for _ in range(c[0].count)]
    if canvas is None or len(canvas.objects) != len(slots):
        return False
    if caption.background is not None and canvas.background != caption.background:
        return False
    return any(
        all(
            clause.matches(o) and (side is None or on_side(canvas, o, side, JUDGED))
            for (clause, side), o in zip(slots, order, strict=True)
        )
        and (caption.relation is None or related(order[0], order[1], caption.relation, BETWEEN["judged"]))
        for order in permutations(canvas.objects)
    )


def draw_canvas(rng: random.Random, task: str) -> Canvas:
    """A canvas that a caption of the task can describe."""
    count = {"single_object": 1, "colors": 1, "two_object": 2}.get(task) or rng.randint(2, MAX_OBJECTS)
    if task != "counting":
        return random_canvas(rng, count)
    while True:  # all alike, so none may touch another: few places are left
        canvas = random_canvas(rng, 1)
        for _ in range(64):
            new = random_object(rng, canvas.height, canvas.width)
            first = canvas.objects[0]
            new = replace(new, colour=first.colour, shape=first.shape, size=first.size)
            larger = replace(canvas, objects=(*canvas.objects, new))
            canvas = larger if len(canvas.objects) < count and allowed(larger) else canvas
        if len(canvas.objects) == count:
            return canvas


def describe(rng: random.Random, canvas: Canvas, task: str) -> FreeCaption:
    """One of several phrasings of a canvas drawn for the task."""
    objects = list(canvas.objects)
    rng.shuffle(objects)
    if task == "counting":
        o = objects[0]
        clauses = [Clause(len(objects), o.shape, o.colour if rng.random() < 0.5 else None)]
    elif task in ("single_object", "two_object"):
        clauses = [Clause(1, o.shape) for o in objects]
    else:
        clauses = [Clause(1, o.shape, o.colour, o.size) for o in objects]
    sides: list[str | None] = [None] * len(clauses)
    relation = None
    names = [noun(clause) for clause in clauses]
    text = rng.choice(["{}", "a picture of {}", "a scene with {}"]).format(join(names))
    if task == "position":
        holding = [r for r in RELATIONS if related(objects[0], objects[1], r, BETWEEN["drawn"])]
        if len(objects) == 2 and holding and rng.random() < 0.5:
            relation = rng.choice(holding)
            text = f"{names[0]} {relation} {names[1]}"
        else:
            found = [[side for side in SIDES if on_side(canvas, o, side, DRAWN)] for o in objects]
            sides = [rng.choice(options) if options else None for options in found]
            text = join([f"{name} {side}" if side else name for name, side in zip(names, sides, strict=True)])
    background = canvas.background if task in ("position", "color_attr") else None
    text = f"{text} on {background}" if background else text
    return FreeCaption(text, task, tuple(clauses), tuple(sides), relation, background)
