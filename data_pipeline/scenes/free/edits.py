"""Edits of canvases, of one picture or with a second one as a reference, and whether a picture is what they ask for.

Where an instruction leaves the place open ("on the left"), any place there will do; all else must be where it was.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

from data_pipeline.scenes.captions import Clause, noun
from data_pipeline.scenes.free.captions import DRAWN, JUDGED, SIDES, on_side
from data_pipeline.scenes.free.world import MAX_OBJECTS, Canvas, Placed, allowed, random_canvas, random_object
from data_pipeline.scenes.world import BACKGROUNDS, COLOURS

KINDS = ("add", "remove", "replace", "recolour", "move", "keep", "background", "combine")
SLACK = 3  # pixels that an object may have moved and still be where it was
TRIES = 64


@dataclass(frozen=True)
class FreeEdit:
    """Do `instruction` to the first source and get `target`, or the like where the place of `placed` is open.

    Attributes:
        sources: the picture to edit, and the second picture that a "combine" takes an object from.
        placed: the object of the target that may be anywhere on `side`.
    """

    kind: str
    instruction: str
    sources: tuple[Canvas, ...]
    target: Canvas
    placed: Placed | None = None
    side: str = ""


def same(a: tuple[Placed, ...], b: tuple[Placed, ...]) -> bool:
    """Whether two groups hold the same objects at the same places, give or take SLACK."""
    if len(a) != len(b):
        return False
    return any(
        all(o.looks == p.looks and max(abs(o.x - p.x), abs(o.y - p.y)) <= SLACK for o, p in zip(a, order, strict=True))
        for order in permutations(b)
    )


def edit_success(edit: FreeEdit, canvas: Canvas | None) -> bool:
    """The instruction done and everything else preserved, judged on what was read from a picture."""
    target = edit.target
    if canvas is None or (canvas.height, canvas.width, canvas.background) != (
        target.height,
        target.width,
        target.background,
    ):
        return False
    if edit.placed is None:
        return same(target.objects, canvas.objects)
    rest = target.without(edit.placed).objects
    there = [o for o in canvas.objects if o.looks == edit.placed.looks and on_side(canvas, o, edit.side, JUDGED)]
    return any(same(rest, canvas.without(o).objects) for o in there)


def preservation(edit: FreeEdit, canvas: Canvas | None) -> float:
    """Share of the source's objects that the edit leaves alone and that are where they were, in [0, 1]."""
    kept = [o for o in edit.sources[0].objects if o in edit.target.objects]
    if not kept:
        return 1.0
    found = () if canvas is None else canvas.objects
    return sum(any(same((o,), (p,)) for p in found) for o in kept) / len(kept)


def phrase(o: Placed, article: bool = True) -> str:
    """ "a small red circle"."""
    return noun(Clause(1, o.shape, o.colour, o.size), article)


def put(rng: random.Random, canvas: Canvas, looks: Placed, side: str) -> tuple[Canvas, Placed] | None:
    """The canvas with an object of these looks in front, somewhere on a side; None where no place was found."""
    for _ in range(TRIES):
        place = random_object(rng, canvas.height, canvas.width)
        new = replace(looks, x=place.x, y=place.y)
        larger = replace(canvas, objects=(*canvas.objects, new))
        if on_side(canvas, new, side, DRAWN) and allowed(larger):
            return larger, new
    return None


def draw_edit(rng: random.Random, source: Canvas, kind: str) -> FreeEdit | None:
    """An edit of one kind, or None where the canvas does not allow it."""
    if kind == "keep":
        texts = ["keep everything", "change nothing", "leave the picture as it is"]
        return FreeEdit(kind, rng.choice(texts), (source,), source)
    if kind == "background":
        colour = rng.choice([b for b in BACKGROUNDS if b != source.background])
        text = rng.choice(["make the background {}", "change the background to {}"]).format(colour)
        return FreeEdit(kind, text, (source,), replace(source, background=colour))
    if kind in ("add", "combine"):
        return draw_addition(rng, source, kind)
    names = [o.looks for o in source.objects]
    o = rng.choice([o for o in source.objects if names.count(o.looks) == 1] or [None])
    if o is None:
        return None
    what = f"the {phrase(o, article=False)}"
    if kind == "remove":
        text = rng.choice(["remove {}", "delete {}"]).format(what)
        return FreeEdit(kind, text, (source,), source.without(o)) if len(names) > 1 else None
    if kind == "move":
        side = rng.choice([side for side in SIDES if not on_side(source, o, side, JUDGED)])
        found = put(rng, source.without(o), o, side)
        text = f"move {what} {side.replace('on ', 'to ').replace('at ', 'to ')}"
        return found and FreeEdit(kind, text, (source,), found[0], found[1], side)
    if kind == "recolour":
        new = replace(o, colour=rng.choice([c for c in COLOURS if c != o.colour]))
        text = rng.choice(["make {} {}", "change the colour of {} to {}", "paint {} {}"]).format(what, new.colour)
    else:
        looks = random_object(rng, source.height, source.width)
        new = replace(looks, x=o.x, y=o.y)
        if new.shape == o.shape:
            return None
        text = rng.choice(["replace {} with {}", "turn {} into {}"]).format(what, phrase(new))
    target = source.swapped(o, new)
    return FreeEdit(kind, text, (source,), target) if allowed(target) else None


def draw_addition(rng: random.Random, source: Canvas, kind: str) -> FreeEdit | None:
    """An object more: named in words, or shown in a second picture."""
    if len(source.objects) >= MAX_OBJECTS:
        return None
    side = rng.choice(list(SIDES))
    shown = random_canvas(rng, 1)
    found = put(rng, source, shown.objects[0], side)
    if found is None:
        return None
    if kind == "add":
        text = rng.choice(["add {} {}", "put {} {}"]).format(phrase(found[1]), side)
        return FreeEdit(kind, text, (source,), *found, side)
    texts = ["put the object of the second picture into the first, {}", "add what the second picture shows {}"]
    return FreeEdit(kind, rng.choice(texts).format(side), (source, shown), *found, side)


def random_edit(rng: random.Random, split: str) -> FreeEdit:
    """An edit whose first source and target both lie in `split`; its kind is drawn uniformly."""
    kind = rng.choice(KINDS)
    while True:
        source = random_canvas(rng, rng.randint(1, MAX_OBJECTS))
        if source.split != split:
            continue
        for _ in range(TRIES):
            edit = draw_edit(rng, source, kind)
            if edit is None:
                break
            if edit.target.split == split:
                return edit
