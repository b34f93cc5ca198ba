"""Questions about scenes, each with its one right answer: what a vision-language model is taught and measured by."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.scenes.captions import NUMBERS, Caption, Clause, describe, noun, random_caption
from data_pipeline.scenes.edits import Edit, phrase, random_edit
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Object, Scene, random_scene

NOTHING = "nothing"


@dataclass(frozen=True)
class Question:
    """What is asked of a picture, or of no picture, and the answer.

    >>> ask(random.Random(0), Scene(1, (Object(3, "red", "circle"),)), "describe").answer
    'bottom right red circle'
    """

    kind: str
    text: str
    answer: str
    scene: Scene | None


def listing(scene: Scene) -> str:
    """Every object by its cell, in reading order: the one description of a scene."""
    names = LEVELS[scene.level].cell_names
    found = ", ".join(f"{names[o.cell]} {phrase(o, scene.level, article=False)}" for o in scene.objects) or NOTHING
    return found if len(LEVELS[scene.level].backgrounds) == 1 else f"{found} on {scene.background}"


def wanted(caption: Caption, level: int) -> str:
    """What a caption asks for, object by object as `listing` has them, but for what it leaves open.

    >>> clauses = (Clause(1, "circle", "red"), Clause(2, "cross"))
    >>> wanted(Caption("a red circle and two crosses", "counting", clauses), 1)
    'red circle, cross, cross'
    """
    names, clauses = LEVELS[level].cell_names, caption.clauses
    if caption.task == "position" and caption.relation is None:
        clauses = tuple(sorted(clauses, key=lambda clause: clause.cell or 0))
    words = [
        " ".join(filter(None, ["" if c.cell is None else names[c.cell], c.size, c.colour, c.shape]))
        for c in clauses
        for _ in range(c.count)
    ]
    found = f" {caption.relation} ".join(words) if caption.relation else ", ".join(words)
    return f"{found} on {caption.background}" if caption.background else found


def asks_for_everything(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A description."""
    return rng.choice(["Describe the picture.", "What is in the picture?"]), listing(scene)


def asks_for_a_cell(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """What is in one cell, often an empty one."""
    cell = rng.randrange(LEVELS[scene.level].grid ** 2)
    found = scene.at(cell)
    answer = NOTHING if found is None else phrase(found, scene.level, article=False)
    return f"What is in the {LEVELS[scene.level].cell_names[cell]}?", answer


def asks_for_a_number(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """How many objects of a shape or of a colour."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if scene.objects and rng.random() < 0.75:
        one = rng.choice(scene.objects)
        colour, shape = one.colour, one.shape
    by_colour = rng.random() < 0.5
    count = sum(o.colour == colour if by_colour else o.shape == shape for o in scene.objects)
    plural = f"{colour} objects" if by_colour else noun(Clause(2, shape)).removeprefix(f"{NUMBERS[2]} ")
    return f"How many {plural} are there?", NUMBERS.get(count, "zero")


def asks_for_presence(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether there is such an object; as often there is as not."""
    objects = list(scene.objects)
    if objects and rng.random() < 0.5:
        wanted = rng.choice(objects)
    else:
        wanted = Object(0, rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(LEVELS[scene.level].sizes))
    name = phrase(wanted, scene.level)
    there = any(phrase(o, scene.level) == name for o in objects)
    return f"Is there {name}?", "yes" if there else "no"


# What can be asked of any picture.
ABOUT: dict[str, Callable[[random.Random, Scene], tuple[str, str]]] = {
    "describe": asks_for_everything,
    "cell": asks_for_a_cell,
    "count": asks_for_a_number,
    "presence": asks_for_presence,
}
KINDS = (*ABOUT, "after", "fix", "plan")


def ask(rng: random.Random, scene: Scene, kind: str) -> Question:
    """A question of one kind of ABOUT."""
    return Question(kind, *ABOUT[kind](rng, scene), scene)


def change(caption: str) -> str:
    """The question what to do to a picture for it to be of a caption."""
    return f"What must change to get {caption}?"


def instruction(edit: Edit) -> str:
    """The one wording of an edit that names every object by its cell."""
    source, target, names = edit.source, edit.target, LEVELS[edit.source.level].cell_names
    if edit.kind == "keep":
        return NOTHING
    if edit.kind == "background":
        return f"make the background {target.background}"
    gone = next((o for o in source.objects if o not in target.objects), None)
    new = next((o for o in target.objects if o not in source.objects), None)
    if gone is None:
        assert new is not None
        return f"add {phrase(new, source.level)} in the {names[new.cell]}"
    what = f"the {phrase(gone, source.level, article=False)} in the {names[gone.cell]}"
    if new is None:
        return f"remove {what}"
    if edit.kind == "move":
        return f"move {what} to the {names[new.cell]}"
    return (
        f"make {what} {new.colour}" if edit.kind == "recolour" else f"replace {what} with {phrase(new, source.level)}"
    )


def random_question(rng: random.Random, level: int, split: str, kind: str) -> Question:
    """A question about a scene of `split`.

    "after": what a picture will show once an instruction is done. "fix": the instruction that makes it fit a caption.
    "plan": the places of what a caption names, without a picture. Half of these questions about training scenes are
    worded as a Metaquery model is asked to edit and to generate, of any caption, which a VLM of the full size
    understands by itself.
    """
    if kind in ("after", "fix"):
        edit = random_edit(rng, level, split)
        if kind == "after":
            asked = "" if split == "train" and rng.random() < 0.5 else "What will it show? "
            return Question(kind, f"{asked}{edit.instruction}", listing(edit.target), edit.source)
        caption = placed(rng, edit.target) if rng.random() < 0.5 else listing(edit.target)
        return Question(kind, change(caption), instruction(edit), edit.source)
    if kind == "plan" and split == "train" and rng.random() < 0.5:
        _, drawn = random_caption(rng, level, split)
        return Question(kind, f"Generate an image: {drawn.text}", wanted(drawn, level), None)
    while True:
        scene = random_scene(rng, level, rng.randint(1, LEVELS[level].max_objects))
        if scene.split == split:
            break
    if kind != "plan":
        return ask(rng, scene, kind)
    return Question(kind, f"Where is what? {placed(rng, scene)}", listing(scene), None)


def placed(rng: random.Random, scene: Scene) -> str:
    """A caption that names the places of all objects; a relation would leave more than one right answer."""
    while (caption := describe(rng, scene, "position")).relation is not None:
        pass
    return caption.text


def benchmark(level: int, count: int, seed: int) -> list[Question]:
    """`count` questions about held-out scenes, kinds in turn, the same for everyone at a seed."""
    rng = random.Random(f"questions/{level}/{seed}")
    return [random_question(rng, level, "val", KINDS[i % len(KINDS)]) for i in range(count)]
