"""What a scene is: coloured shapes on a grid, at a level. The canonical text of a scene decides its split."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
    "pink": (245, 190, 200),
}
SIZES = {"small": 8.0, "large": 11.0}  # half extents in pixels
CELL = 32  # pixels


@dataclass(frozen=True)
class Level:
    """A world: its grid and what may vary in it."""

    grid: int
    max_objects: int
    sizes: tuple[str, ...]
    backgrounds: tuple[str, ...]

    @property
    def resolution(self) -> int:
        """Side of a picture in pixels."""
        return self.grid * CELL

    @property
    def cell_names(self) -> tuple[str, ...]:
        """Names of the cells in reading order, "top left" first."""
        middle, centre = (("middle",), ("centre",)) if self.grid == 3 else ((), ())
        rows, columns = ("top", *middle, "bottom"), ("left", *centre, "right")
        return tuple(f"{row} {column}" for row in rows for column in columns)


LEVELS = {
    1: Level(grid=2, max_objects=3, sizes=("large",), backgrounds=("white",)),
    2: Level(grid=3, max_objects=4, sizes=tuple(SIZES), backgrounds=tuple(BACKGROUNDS)),
}


@dataclass(frozen=True, order=True)
class Object:
    """One shape, centred in a cell (index in reading order)."""

    cell: int
    colour: str
    shape: str
    size: str = "large"


@dataclass(frozen=True)
class Scene:
    """At most one object a cell, in the order of the cells.

    >>> Scene(1, (Object(3, "red", "circle"), Object(0, "blue", "square"))).canonical
    '1|white|0:blue-square-large|3:red-circle-large'
    """

    level: int
    objects: tuple[Object, ...]
    background: str = "white"

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))
        cells = [o.cell for o in self.objects]
        if len(set(cells)) != len(cells):
            raise ValueError(f"a scene holds one object a cell, got cells {cells}; move one of the objects")

    @property
    def canonical(self) -> str:
        """The one text of this scene, equal for equal scenes."""
        objects = (f"{o.cell}:{o.colour}-{o.shape}-{o.size}" for o in self.objects)
        return "|".join([str(self.level), self.background, *objects])

    @property
    def split(self) -> str:
        """ "val" for one scene of sixteen by sha256 of its canonical text; scenes of one object are always "train"."""
        if len(self.objects) < 2:
            return "train"
        return "val" if hashlib.sha256(self.canonical.encode()).digest()[-1] % 16 == 0 else "train"

    def at(self, cell: int) -> Object | None:
        """The object in a cell."""
        return next((o for o in self.objects if o.cell == cell), None)

    def without(self, target: Object) -> Scene:
        """This scene with one object gone."""
        return replace(self, objects=tuple(o for o in self.objects if o != target))

    def with_object(self, new: Object) -> Scene:
        """This scene with an object put into an empty cell."""
        return replace(self, objects=(*self.objects, new))

    def empty_cells(self) -> list[int]:
        """Cells without an object."""
        taken = {o.cell for o in self.objects}
        return [c for c in range(LEVELS[self.level].grid ** 2) if c not in taken]


def parse(canonical: str) -> Scene:
    """The inverse of `Scene.canonical`.

    >>> parse("1|white|0:blue-square-large").objects[0].colour
    'blue'
    """
    level, background, *objects = canonical.split("|")
    parts = [o.split(":") for o in objects]
    return Scene(int(level), tuple(Object(int(cell), *what.split("-")) for cell, what in parts), background)


def random_object(rng: random.Random, level: int, cell: int) -> Object:
    """Colour, shape and size drawn uniformly."""
    return Object(cell, rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(LEVELS[level].sizes))


def random_scene(rng: random.Random, level: int, count: int) -> Scene:
    """`count` objects in distinct cells, everything else drawn uniformly."""
    world = LEVELS[level]
    cells = rng.sample(range(world.grid**2), count)
    objects = tuple(random_object(rng, level, cell) for cell in cells)
    return Scene(level, objects, rng.choice(world.backgrounds))
