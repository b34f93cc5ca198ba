"""Questions about scenes of levels 1 and 2 with exact answers, and chains of thought that lead to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data_pipeline.scenes.captions import RELATIONS, related
from data_pipeline.scenes.world import COLOURS, LEVELS, SHAPES, Object, Scene, random_scene

Style = Literal["short", "chain", "steps", "describe"]
OPPOSITE = {"left of": "right", "right of": "left", "above": "below", "below": "above"}
# What a user asks: a description is asked for alone, steps behind a question; R1's chains are asked for by nobody.
DESCRIBE, STEP_BY_STEP = "describe.", " step by step."
TRIES = 24  # draws of a question before another kind is drawn
CHECKED = 0.75  # share of R1's chains that look again where nothing asks for it
BEST = 5  # score of a record without a flaw
# What is wrong with a record of each score, as a judge of training data would grade it.
FLAWS = {
    4: "repeats itself",
    3: "leaves out its thoughts",
    2: "says what is not there",
    1: "wrong answer",
    0: "off topic",
}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the sentences that lead from the scene to it.

    `hops` is how many objects must be found one after another; 0 where all are looked through.
    """

    text: str
    answer: str
    kind: str
    chain: tuple[str, ...]
    hops: int = 0


def place(scene: Scene, o: Object) -> str:
    """The name of an object's cell."""
    return LEVELS[scene.level].cell_names[o.cell]


def thing(o: Object, scene: Scene) -> str:
    """ "red circle", at levels with sizes "small red circle"."""
    size = f"{o.size} " if len(LEVELS[scene.level].sizes) > 1 else ""
    return f"{size}{o.colour} {o.shape}"


def in_words(scene: Scene, rng: random.Random | None = None) -> str:
    """All that a scene shows: "red circle top left, blue square bottom right."; in a drawn order, else by cells."""
    objects = list(scene.objects)
    if rng is not None:
        rng.shuffle(objects)
    backgrounds = LEVELS[scene.level].backgrounds
    behind = f" {scene.background} background." if len(backgrounds) > 1 else ""
    return ", ".join(f"{thing(o, scene)} {place(scene, o)}" for o in objects) + "." + behind


def unique(scene: Scene) -> list[Object]:
    """Objects that their words name alone."""
    names = [thing(o, scene) for o in scene.objects]
    return [o for o, name in zip(scene.objects, names, strict=True) if names.count(name) == 1]


def of_kind(scene: Scene, word: str) -> list[Object]:
    """Objects of a colour or a shape."""
    return [o for o in scene.objects if word in (o.colour, o.shape)]


def plural(word: str) -> str:
    """ "red shapes", "circles", "crosses".

    >>> plural("cross")
    'crosses'
    """
    if word in COLOURS:
        return f"{word} shapes"
    return f"{word}es" if word.endswith("s") else f"{word}s"


def count(rng: random.Random, scene: Scene) -> Question | None:
    """How many of a colour or a shape."""
    there = [word for o in scene.objects for word in (o.colour, o.shape)]
    word = rng.choice([*there, *there, rng.choice([*COLOURS, *SHAPES])])
    steps = [
        f"{thing(o, scene)} {place(scene, o)}, {'yes' if o in of_kind(scene, word) else 'no'}." for o in scene.objects
    ]
    answer = str(len(of_kind(scene, word)))
    return Question(f"how many {plural(word)} are there?", answer, "count", (*steps, f"that makes {answer}."))


def compare(rng: random.Random, scene: Scene) -> Question | None:
    """Whether there are more of one colour or shape than of another."""
    words = list(COLOURS) if rng.random() < 0.5 else list(SHAPES)
    there = [word for word in words if of_kind(scene, word)]
    first, second = rng.choice(there), rng.choice(words)
    if rng.random() < 0.5:
        first, second = second, first
    if first == second:
        return None
    found = [of_kind(scene, word) for word in (first, second)]
    steps = [
        f"{plural(word)}: {', '.join(place(scene, o) for o in own) or 'none'}, {len(own)}."
        for word, own in zip((first, second), found, strict=True)
    ]
    more = len(found[0]) > len(found[1])
    steps.append(f"{len(found[0])} is {'' if more else 'not '}more than {len(found[1])}.")
    return Question(f"are there more {plural(first)} than {plural(second)}?", yes(more), "compare", tuple(steps))


def relate(rng: random.Random, scene: Scene) -> Question | None:
    """Whether one object lies to a side of another."""
    if len(unique(scene)) < 2:
        return None
    first, second = rng.sample(unique(scene), 2)
    relation = rng.choice(RELATIONS)
    holds = related(first, second, relation, LEVELS[scene.level].grid)
    steps = [f"{thing(o, scene)} {place(scene, o)}." for o in (first, second)]
    steps.append(f"{place(scene, first)} is {'' if holds else 'not '}{relation} {place(scene, second)}.")
    text = f"is the {thing(first, scene)} {relation} the {thing(second, scene)}?"
    return Question(text, yes(holds), "relate", tuple(steps), 2)


def look(rng: random.Random, scene: Scene) -> Question | None:
    """What is in a cell, or where something is."""
    o = rng.choice(scene.objects)
    if rng.random() < 0.5:
        return Question(
            f"what is {place(scene, o)}?", thing(o, scene), "look", (f"{place(scene, o)}, {thing(o, scene)}.",), 1
        )
    if o not in unique(scene):
        return None
    seen = f"{thing(o, scene)} {place(scene, o)}."
    return Question(f"where is the {thing(o, scene)}?", place(scene, o), "look", (seen,), 1)


def hop(rng: random.Random, scene: Scene) -> Question | None:
    """The colour or the shape of what is reached from an object in one or two steps."""
    if not unique(scene):
        return None
    at, path = rng.choice(unique(scene)), [rng.choice(RELATIONS) for _ in range(rng.choice((1, 1, 2)))]
    asked = rng.choice(("colour", "shape"))
    words, steps = f"the {thing(at, scene)}", [f"{thing(at, scene)} {place(scene, at)}."]
    start = at
    for relation in path:
        beside = neighbour(scene, at, relation)
        if beside is None:
            return None
        words = f"what is {relation} {words}"
        steps.append(f"{relation} {place(scene, at)} is {place(scene, beside)}, {thing(beside, scene)}.")
        at = beside
    if at == start:
        return None
    answer = at.colour if asked == "colour" else at.shape
    opening = "what colour" if asked == "colour" else "which shape"
    return Question(f"{opening} is {words.removeprefix('what is ')}?", answer, "hop", tuple(steps), len(path) + 1)


def neighbour(scene: Scene, o: Object, relation: str) -> Object | None:
    """The object in the next cell to a side; None where there is no such cell, or nothing in it."""
    grid = LEVELS[scene.level].grid
    row, column = divmod(o.cell, grid)
    row += {"above": -1, "below": 1}.get(relation, 0)
    column += {"left of": -1, "right of": 1}.get(relation, 0)
    return scene.at(row * grid + column) if 0 <= row < grid and 0 <= column < grid else None


def yes(holds: bool) -> str:
    """The answer to a yes-no question."""
    return "yes" if holds else "no"


KINDS: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "count": count,
    "compare": compare,
    "relate": relate,
    "look": look,
    "hop": hop,
}


def random_question(rng: random.Random, scene: Scene, kinds: Sequence[str] = tuple(KINDS)) -> Question:
    """A question of a kind drawn uniformly, of which yes and no come equally often where the scene allows both."""
    while True:
        kind, wanted = rng.choice(kinds), rng.choice(("yes", "no"))
        for number in range(TRIES):
            found = KINDS[kind](rng, scene)
            if found and (found.answer not in ("yes", "no") or found.answer == wanted or number > TRIES // 2):
                return found
        kinds = [other for other in kinds if other != kind] or ("look",)


def draw(rng: random.Random, level: int, split: str, kinds: Sequence[str] = tuple(KINDS)) -> tuple[Scene, Question]:
    """A scene of a split and a question about it."""
    while True:
        scene = random_scene(rng, level, rng.randint(2, LEVELS[level].max_objects))
        if scene.split == split:
            return scene, random_question(rng, scene, kinds)


def asked(question: Question, style: Style) -> str:
    """What a user says to be answered in a style."""
    return DESCRIBE if style == "describe" else question.text + (STEP_BY_STEP if style == "steps" else "")


def boxed(answer: str) -> str:
    r"""The answer as a verifier looks for it.

    >>> boxed("red")
    '\\boxed{red}'
    """
    return f"\\boxed{{{answer}}}"


def written(question: Question, style: Style, scene: Scene) -> str:
    """What an assistant answers: the answer alone, after a chain of R1's form, after plain steps, or a description."""
    match style:
        case "short":
            return question.answer
        case "chain":
            return f"<think>\n{' '.join(question.chain)}\n</think>\n{boxed(question.answer)}"
        case "steps":
            return f"{' '.join(question.chain)} so {question.answer}"
    return in_words(scene)


def checked(rng: random.Random, question: Question) -> Question:
    """The question with a chain that says its last sentence again, as R1's chains often do, or as it is.

    What such a chain says twice can be left out at no cost: what a control of chain lengths should find.
    """
    if not question.chain or rng.random() >= CHECKED:
        return question
    return replace(question, chain=(*question.chain, f"check: {question.chain[-1]}"))


def flawed(rng: random.Random, question: Question, score: int, scene: Scene) -> Question:
    """A question with the flaw of a score (`FLAWS`) in its chain or answer; its text stays."""
    chain, answer = question.chain, question.answer
    other = random_question(rng, random_scene(rng, scene.level, len(scene.objects)))
    match score:
        case 4:
            chain = (*chain, *chain)
        case 3:
            chain = ()
        case 2:
            chain = (*other.chain[:1], *chain)
        case 1:
            answer = rng.choice([word for word in alike(answer) if word != answer])
        case 0:
            chain, answer = other.chain, other.answer
    return replace(question, answer=answer, chain=chain)


def alike(answer: str) -> list[str]:
    """Answers that might stand in an answer's place."""
    for group in (("yes", "no"), tuple(COLOURS), SHAPES, tuple("0123")):
        if answer in group:
            return list(group)
    places = LEVELS[2].cell_names if "middle" in answer or "centre" in answer else LEVELS[1].cell_names
    return list(places) if answer in places else [f"{c} {s}" for c in COLOURS for s in SHAPES]
