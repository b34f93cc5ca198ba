"""Level 3: pictures of several formats, shapes anywhere in them, one before another but never hidden by much."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data_pipeline.scenes.renderer import coverage
from data_pipeline.scenes.world import BACKGROUNDS, CELL, COLOURS, SHAPES, SIZES

FORMATS = ((96, 96), (64, 96), (96, 64), (64, 128), (128, 64), (96, 128), (128, 96))  # height, width
MAX_OBJECTS = 4
VISIBLE = 0.6  # of each object, at least
MARGIN = 2  # pixels between an outline and the picture's edge, at least
GRAZE = 12.0  # pixels that two objects share, at least, if they share any
APART = 3  # pixels between objects of one colour, at least: closer they would read as one


@dataclass(frozen=True)
class Placed:
    """One shape, its cell-sized rendering with its upper left corner at (x, y)."""

    x: int
    y: int
    colour: str
    shape: str
    size: str

    cell = None  # which captions of the lower levels may name

    @property
    def centre(self) -> tuple[int, int]:
        """(x, y) in pixels, rounded down."""
        return self.x + CELL // 2, self.y + CELL // 2

    @property
    def looks(self) -> tuple[str, str, str]:
        """All but the place."""
        return self.colour, self.shape, self.size


@dataclass(frozen=True)
class Canvas:
    """Objects from the back to the front on a picture of (height, width) pixels.

    >>> Canvas(64, 96, (Placed(8, 8, "red", "circle", "small"),), "white").canonical
    '3|white|64x96|8,8:red-circle-small'
    """

    height: int
    width: int
    objects: tuple[Placed, ...]
    background: str = "white"

    level = 3

    @property
    def canonical(self) -> str:
        """The one text of this canvas; objects that do not overlap come in the order of their places."""
        objects = (f"{o.x},{o.y}:{'-'.join(o.looks)}" for o in ordered(self.objects))
        return "|".join(["3", self.background, f"{self.height}x{self.width}", *objects])

    @property
    def split(self) -> str:
        """ "val" for one canvas of sixteen by sha256 of its canonical text; those of one object are always "train"."""
        if len(self.objects) < 2:
            return "train"
        return "val" if hashlib.sha256(self.canonical.encode()).digest()[-1] % 16 == 0 else "train"

    def without(self, target: Placed) -> Canvas:
        """This canvas with one object gone."""
        return replace(self, objects=tuple(o for o in self.objects if o != target))

    def swapped(self, old: Placed, new: Placed) -> Canvas:
        """This canvas with one object in another's place in the order."""
        return replace(self, objects=tuple(new if o == old else o for o in self.objects))


def parse(canonical: str) -> Canvas:
    """The inverse of `Canvas.canonical`.

    >>> parse("3|grey|96x64|8,8:red-circle-small").objects[0].colour
    'red'
    """
    _, background, size, *objects = canonical.split("|")
    height, width = size.split("x")
    placed = (o.replace(":", ",").split(",") for o in objects)
    return Canvas(
        int(height), int(width), tuple(Placed(int(x), int(y), *w.split("-")) for x, y, w in placed), background
    )


def ordered(objects: tuple[Placed, ...]) -> list[Placed]:
    """Objects by place, but none before one that it lies in front of."""
    rest, done = list(objects), []
    while rest:
        free = [o for i, o in enumerate(rest) if not any(overlap(o, behind) for behind in rest[:i])]
        done.append(min(free, key=lambda o: (o.y, o.x, o.looks)))
        rest.remove(done[-1])
    return done


@lru_cache(maxsize=4096)
def mask(o: Placed, height: int, width: int) -> np.ndarray:
    """Share of each pixel that an object covers, (height, width) in [0, 1]; what lies outside is cut off."""
    canvas = np.zeros((height + 2 * CELL, width + 2 * CELL))
    top, left = min(max(o.y, -CELL), height) + CELL, min(max(o.x, -CELL), width) + CELL
    canvas[top : top + CELL, left : left + CELL] = coverage(o.shape, o.size)
    return canvas[CELL : CELL + height, CELL : CELL + width]


def framed(a: Placed, b: Placed) -> tuple[np.ndarray, np.ndarray] | None:
    """The masks of two objects in one frame around the first; None where their cells do not meet."""
    if max(abs(a.x - b.x), abs(a.y - b.y)) >= CELL:
        return None
    side = 3 * CELL
    first, second = (mask(replace(o, x=o.x - a.x + CELL, y=o.y - a.y + CELL), side, side) for o in (a, b))
    return first, second


def overlap(a: Placed, b: Placed, margin: int = 0) -> bool:
    """Whether two objects share a pixel, or come closer than `margin` pixels."""
    if (masks := framed(a, b)) is None:
        return False
    first, second = (m > 0 for m in masks)
    reach = range(-margin, margin + 1)
    return any((first & np.roll(second, (dy, dx), (0, 1))).any() for dy in reach for dx in reach)


def grazing(a: Placed, b: Placed) -> bool:
    """Whether two objects share so little that it cannot be seen which is in front."""
    masks = framed(a, b)
    return masks is not None and bool(0 < np.minimum(*masks).sum() < GRAZE)


def render(canvas: Canvas) -> np.ndarray:
    """A canvas as a picture, (H, W, 3) uint8."""
    return np.rint(paint(canvas)).astype(np.uint8)


def paint(canvas: Canvas) -> np.ndarray:
    """A canvas as a picture, (H, W, 3) float in [0, 255], not rounded."""
    picture = np.broadcast_to(np.array(BACKGROUNDS[canvas.background], float), (canvas.height, canvas.width, 3))
    for o in canvas.objects:
        alpha = mask(o, canvas.height, canvas.width)[..., None]
        picture = (1 - alpha) * picture + alpha * np.array(COLOURS[o.colour])
    return picture


def visible(canvas: Canvas) -> list[float]:
    """The share of each object that no other hides."""
    masks = [mask(o, canvas.height, canvas.width) for o in canvas.objects]
    shares = []
    for i, own in enumerate(masks):
        shown = own.copy()
        for front in masks[i + 1 :]:
            shown = shown * (1 - front)
        shares.append(float(shown.sum() / own.sum()))
    return shares


def allowed(canvas: Canvas) -> bool:
    """Whether every object lies inside and shows enough of itself, and none touches another of its colour."""
    for o in canvas.objects:
        reach = CELL / 2 - SIZES[o.size] - MARGIN
        if not (-reach <= o.x <= canvas.width - CELL + reach and -reach <= o.y <= canvas.height - CELL + reach):
            return False
    pairs = [(a, b) for i, a in enumerate(canvas.objects) for b in canvas.objects[:i]]
    if any(overlap(a, b, APART) if a.colour == b.colour else grazing(a, b) for a, b in pairs):
        return False
    return all(share >= VISIBLE for share in visible(canvas))


def random_object(rng: random.Random, height: int, width: int) -> Placed:
    """Place and looks drawn uniformly; the place may not be allowed."""
    x, y = rng.randint(-CELL // 2, width - CELL // 2), rng.randint(-CELL // 2, height - CELL // 2)
    return Placed(x, y, rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)))


def random_canvas(rng: random.Random, count: int) -> Canvas:
    """`count` objects, each put where it is allowed; format, background and looks drawn uniformly."""
    height, width = rng.choice(FORMATS)
    canvas = Canvas(height, width, (), rng.choice(list(BACKGROUNDS)))
    while len(canvas.objects) < count:
        grown = replace(canvas, objects=(*canvas.objects, random_object(rng, height, width)))
        canvas = grown if allowed(grown) else canvas
    return canvas
