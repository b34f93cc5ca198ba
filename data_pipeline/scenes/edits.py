"""Edits of scenes: an instruction and the one target that does it and changes nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from data_pipeline.scenes.captions import Clause, noun
from data_pipeline.scenes.verifier import Reading
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Object, Scene, random_object, random_scene

KINDS = ("add", "remove", "replace", "recolour", "move", "keep", "background")
# How often training draws the kinds that are learned last; held-out edits are drawn uniformly.
TRAINING_WEIGHTS = {"replace": 2.0, "recolour": 2.0, "move": 2.0, "keep": 0.5}


@dataclass(frozen=True)
class Edit:
    """Do `instruction` to `source` and get exactly `target`."""

    kind: str
    instruction: str
    source: Scene
    target: Scene

    @property
    def untouched(self) -> tuple[int, ...]:
        """Cells that the edit must leave as they are."""
        cells = range(LEVELS[self.source.level].grid ** 2)
        return tuple(c for c in cells if self.source.at(c) == self.target.at(c))


def edit_success(edit: Edit, reading: Reading) -> bool:
    """The instruction done and everything else preserved: the picture shows the target and nothing but it."""
    return reading.scene == edit.target


def preservation(edit: Edit, reading: Reading) -> float:
    """Share of the untouched cells read back unchanged, in [0, 1]; 1 where the edit touches every cell."""
    kept = [reading.cells[c] == edit.source.at(c) for c in edit.untouched]
    return sum(kept) / len(kept) if kept else 1.0


def kinds(level: int) -> tuple[str, ...]:
    """The kinds of edit that a level has."""
    return KINDS if len(LEVELS[level].backgrounds) > 1 else KINDS[:-1]


def phrase(o: Object, level: int, article: bool = True) -> str:
    """ "a red circle"; with its size where sizes vary."""
    size = o.size if len(LEVELS[level].sizes) > 1 else None
    return noun(Clause(1, o.shape, o.colour, size), article)


def reference(rng: random.Random, scene: Scene, o: Object) -> str:
    """A phrase that means this object and no other of the scene; by its cell where it has a twin, or by chance."""
    name = phrase(o, scene.level, article=False)
    twins = [other for other in scene.objects if phrase(other, scene.level, article=False) == name]
    if len(twins) > 1 or rng.random() < 0.25:
        return f"the {name} in the {LEVELS[scene.level].cell_names[o.cell]}"
    return f"the {name}"


def draw_edit(rng: random.Random, source: Scene, kind: str) -> Edit | None:
    """An edit of one kind, or None where the scene does not allow it."""
    level, world = source.level, LEVELS[source.level]
    if kind == "keep":
        texts = ["keep everything", "change nothing", "leave the picture as it is"]
        return Edit(kind, rng.choice(texts), source, source)
    if kind == "background":
        colour = rng.choice([b for b in world.backgrounds if b != source.background])
        texts = ["make the background {}", "change the background to {}"]
        return Edit(kind, rng.choice(texts).format(colour), source, replace(source, background=colour))
    if kind == "add":
        if len(source.objects) >= world.max_objects:
            return None
        new = random_object(rng, level, rng.choice(source.empty_cells()))
        texts = ["add {} in the {}", "put {} in the {}"]
        text = rng.choice(texts).format(phrase(new, level), world.cell_names[new.cell])
        return Edit(kind, text, source, source.with_object(new))
    o = rng.choice(source.objects)
    what, rest = reference(rng, source, o), source.without(o)
    if kind == "remove":
        if not rest.objects:
            return None
        return Edit(kind, rng.choice(["remove {}", "delete {}"]).format(what), source, rest)
    if kind == "move":
        moved = replace(o, cell=rng.choice(source.empty_cells()))
        return Edit(kind, f"move {what} to the {world.cell_names[moved.cell]}", source, rest.with_object(moved))
    if kind == "recolour":
        new = replace(o, colour=rng.choice([c for c in COLOURS if c != o.colour]))
        texts = ["make {} {}", "change the colour of {} to {}", "paint {} {}"]
        return Edit(kind, rng.choice(texts).format(what, new.colour), source, rest.with_object(new))
    new = replace(random_object(rng, level, o.cell), shape=rng.choice([s for s in SHAPES if s != o.shape]))
    texts = ["replace {} with {}", "turn {} into {}"]
    return Edit(kind, rng.choice(texts).format(what, phrase(new, level)), source, rest.with_object(new))


def random_edit(rng: random.Random, level: int, split: str) -> Edit:
    """An edit whose source and target both lie in `split`; its kind is drawn uniformly, for training by weight."""
    weights = [TRAINING_WEIGHTS.get(kind, 1.0) if split == "train" else 1.0 for kind in kinds(level)]
    kind = rng.choices(kinds(level), weights)[0]
    while True:
        source = random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects))
        if source.split != split:
            continue
        for _ in range(64):  # another edit of the same scene is cheaper to try than another scene
            edit = draw_edit(rng, source, kind)
            if edit is None:
                break
            if edit.target.split == split:
                return edit
