"""Questions about scenes as a source of conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from data_pipeline.errors import InputError
from data_pipeline.records import ReasoningRecord, Record, Rejected
from data_pipeline.scenes import encode_png
from data_pipeline.scenes.questions import BEST, FLAWS, KINDS, Style, asked, checked, draw, flawed, in_words, written
from data_pipeline.scenes.world import LEVELS
from data_pipeline.sources.protocol import Unit, digest
from data_pipeline.sources.scenes import VAL_SHARE


@dataclass
class SceneQuestions:
    """Rendered scenes with a question each; a sixteenth of each style is held out.

    Attributes:
        level: of the scenes, 1 or 2.
        counts: records by the style of the answer: "short", "chain" (R1's form), "steps" (in plain words), "describe".
        flawed: share of training records that are wrong in one of five ways, equally often; `score` in the metadata
            says how good a record is, from 0 to 5, as a reward model would.
        words: tell the scene in words instead of showing it.
        kinds: of questions; None takes all.
        seed: of the draws.
    """

    level: int = 1
    counts: dict[str, int] = field(default_factory=lambda: {"short": 8192})
    flawed: float = 0.0
    words: bool = False
    kinds: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InputError(f"source.level is {self.level}; questions are asked of the levels {list(LEVELS)}")
        if set(self.counts) - set(get_args(Style)) or min(self.counts.values(), default=0) < 1:
            raise InputError(
                f"source.counts is {self.counts}; expected numbers above 0 of {', '.join(get_args(Style))}"
            )
        if not 0 <= self.flawed <= 1:
            raise InputError(f"source.flawed is {self.flawed}; expected a share from 0 to 1")
        if self.kinds is not None and (not self.kinds or set(self.kinds) - set(KINDS)):
            raise InputError(f"source.kinds is {self.kinds}; expected some of {', '.join(KINDS)}")

    def units(self, records: int) -> Iterator[Unit]:
        """Ranges of numbered records, style by style."""
        for style, count in self.counts.items():
            for start in range(0, count, records):
                where = {"style": style, "start": start, "stop": min(start + records, count)}
                yield Unit(f"{style} answers {start + 1}-{where['stop']}", where, digest(where))

    def read(self, unit: Unit) -> Iterator[Record | Rejected]:
        """The records of a range of numbers."""
        style = unit.where["style"]
        for number in range(unit.where["start"], unit.where["stop"]):
            yield self.record(style, number, "val" if number >= self.counts[style] * (1 - VAL_SHARE) else "train")

    def record(self, style: Style, number: int, split: str) -> ReasoningRecord:
        """A function of its arguments and the seed alone."""
        rng = random.Random(f"{style}/{self.level}/{self.seed}/{number}")
        scene, question = draw(rng, self.level, split, self.kinds or tuple(KINDS))
        score = rng.choice(list(FLAWS)) if split == "train" and rng.random() < self.flawed else BEST
        told = question if score == BEST else flawed(rng, question, score, scene)
        # The same line break after both: a language model that learned from words reads pictures as it read those.
        seen = (in_words(scene, rng) if self.words else "<image>") + "\n"
        pictures = () if self.words else (encode_png(scene),)
        facts = {
            **({} if style == "describe" else {"answer": question.answer}),  # a description answers no question
            "question": question.kind,
            "hops": question.hops,
            "score": score,
            "style": style,
            "scene": scene.canonical,
        }
        told = checked(rng, told) if style == "chain" else told
        turns = (("user", seen + asked(question, style)), ("assistant", written(told, style, scene)))
        return ReasoningRecord(f"{style}-{number:07d}", pictures, turns, "scenes", "CC0-1.0", split, facts)
