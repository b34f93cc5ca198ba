"""Scenes to words, for GenEval's six tasks, and whether a scene satisfies what a caption says.

Tasks after Ghosh et al. 2023 (arXiv 2310.11513): single_object, two_object, counting, colors, position, color_attr.
A caption accounts for every object of its scene; the task decides which attributes it names.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

from data_pipeline.scenes.world import LEVELS, Object, Scene, random_scene

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Share of each task among drawn captions. Training leans to what is learned last: where a caption leaves the places
# open, all cells must agree on one of many scenes.
TASK_WEIGHTS = {
    "train": {"single_object": 1, "two_object": 3, "counting": 2, "colors": 1, "position": 6, "color_attr": 10},
    "val": {"two_object": 2, "counting": 2, "position": 8, "color_attr": 6},
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Clause:
    """`count` objects of a shape; None leaves an attribute open."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None
    cell: int | None = None

    def matches(self, o: Any) -> bool:
        """Whether an object, of any level, is one of those the clause speaks of."""
        named = ((self.shape, o.shape), (self.colour, o.colour), (self.size, o.size), (self.cell, o.cell))
        return all(wanted is None or wanted == found for wanted, found in named)


@dataclass(frozen=True)
class Caption:
    """A text and its meaning. `relation` holds between the first and the second clause's object."""

    text: str
    task: str
    clauses: tuple[Clause, ...]
    relation: str | None = None
    background: str | None = None


def meaning(caption: Any) -> dict[str, Any]:
    """A caption of any level but for its text and task, as plain data for a record's metadata."""
    return {name: value for name, value in asdict(caption).items() if name not in ("text", "task")}


def caption_from(text: str, task: str, found: Mapping[str, Any]) -> Caption:
    """The inverse of `meaning`.

    >>> one = Caption("a circle", "single_object", (Clause(1, "circle"),))
    >>> caption_from(one.text, one.task, meaning(one)) == one
    True
    """
    clauses = tuple(Clause(**clause) for clause in found["clauses"])
    return Caption(text, task, clauses, found["relation"], found["background"])


def related(first: Object, second: Object, relation: str, grid: int) -> bool:
    """Whether `first` is, say, left of `second`: judged by columns for left and right, by rows for above and below."""
    (row1, column1), (row2, column2) = divmod(first.cell, grid), divmod(second.cell, grid)
    return {
        "left of": column1 < column2,
        "right of": column1 > column2,
        "above": row1 < row2,
        "below": row1 > row2,
    }[relation]


def satisfied(caption: Caption, scene: Scene | None) -> bool:
    """Whether the scene holds exactly the objects that the caption speaks of (strict: one object more is wrong)."""
    slots = [clause for clause in caption.clauses for _ in range(clause.count)]
    if scene is None or len(scene.objects) != len(slots):
        return False
    if caption.background is not None and scene.background != caption.background:
        return False
    grid = LEVELS[scene.level].grid
    return any(
        all(slot.matches(o) for slot, o in zip(slots, order, strict=True))
        and (caption.relation is None or related(order[0], order[1], caption.relation, grid))
        for order in permutations(scene.objects)
    )


def noun(clause: Clause, article: bool = True) -> str:
    """ "a small red circle", "three squares"."""
    words = [w for w in (clause.size, clause.colour) if w]
    if clause.count > 1:
        plural = "crosses" if clause.shape == "cross" else clause.shape + "s"
        return " ".join([NUMBERS[clause.count], *words, plural])
    return " ".join([*(["a"] if article else []), *words, clause.shape])


def join(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw_scene(rng: random.Random, level: int, task: str) -> Scene:
    """A scene that a caption of the task can describe."""
    most = LEVELS[level].max_objects
    if task in ("single_object", "colors"):
        return random_scene(rng, level, 1)
    if task == "two_object":
        return random_scene(rng, level, 2)
    if task == "counting":
        scene = random_scene(rng, level, rng.randint(2, most))
        first = scene.objects[0]
        alike = tuple(Object(o.cell, first.colour, first.shape, first.size) for o in scene.objects)
        return Scene(level, alike, scene.background)
    return random_scene(rng, level, rng.randint(2, most))


def random_caption(
    rng: random.Random, level: int, split: str, weights: Mapping[str, float] | None = None
) -> tuple[Scene, Caption]:
    """A scene of `split` and its caption; the task is drawn by weight (the single-object tasks only in "train")."""
    weights = weights or TASK_WEIGHTS[split]
    task = rng.choices(list(weights), list(weights.values()))[0]
    while True:
        scene = draw_scene(rng, level, task)
        if scene.split == split:
            return scene, describe(rng, scene, task)


def describe(rng: random.Random, scene: Scene, task: str) -> Caption:
    """One of several phrasings of a scene drawn for the task."""
    world = LEVELS[scene.level]
    sized, coloured = len(world.sizes) > 1, task not in ("single_object", "two_object")
    background = scene.background if len(world.backgrounds) > 1 and task in ("position", "color_attr") else None
    if task == "counting":
        o = scene.objects[0]
        colour = o.colour if rng.random() < 0.5 else None
        clauses: tuple[Clause, ...] = (Clause(len(scene.objects), o.shape, colour),)
    else:
        objects = list(scene.objects)  # in reading order, as people list what they see
        if task == "position":
            rng.shuffle(objects)
        clauses = tuple(
            Clause(
                1,
                o.shape,
                o.colour if coloured else None,
                o.size if sized and coloured else None,
                o.cell if task == "position" else None,
            )
            for o in objects
        )
    if task == "position":
        caption = positioned(rng, scene, clauses)
    else:
        text = join([noun(clause) for clause in clauses])
        caption = Caption(rng.choice(["{}", "a picture of {}", "a scene with {}"]).format(text), task, clauses)
    if background is None:
        return caption
    text = f"{caption.text} on {background}"
    return Caption(text, task, caption.clauses, caption.relation, background)


def positioned(rng: random.Random, scene: Scene, clauses: tuple[Clause, ...]) -> Caption:
    """A position caption: a relation of two objects in one of three cases where it can, else cells by name."""
    world = LEVELS[scene.level]
    if len(clauses) == 2 and rng.random() < 1 / 3:
        first, second = (next(o for o in scene.objects if c.matches(o)) for c in clauses)
        relation = rng.choice([r for r in RELATIONS if related(first, second, r, world.grid)])
        open_clauses = tuple(Clause(1, c.shape, c.colour, c.size) for c in clauses)
        text = f"{noun(open_clauses[0])} {relation} {noun(open_clauses[1])}"
        return Caption(text, "position", open_clauses, relation)
    named = [(noun(c), noun(c, article=False), world.cell_names[c.cell or 0]) for c in clauses]
    text = rng.choice(
        [
            join([f"{what} in the {where}" for what, _, where in named]),
            ", ".join(f"{where} {bare}" for _, bare, where in named),
            join([f"{what} at the {where}" for what, _, where in named]),
        ]
    )
    return Caption(text, "position", clauses)
