"""Answers to held-out questions about scenes: shown, told in words, or neither; judged exactly."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from data_pipeline.chains import final_answer, split
from data_pipeline.errors import InputError
from data_pipeline.scenes.questions import Question, draw, in_words
from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.world import LEVELS, Scene
from lightning_modules.networks.layout import MARK, Layout
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pipelines.answering import Decoding, TransformersEngine

MODES = ("pictures", "words", "blind")
SO = "so "  # introduces the answer after plain steps


@dataclass
class QuestionBenchmark:
    """Which questions, and how they are answered.

    Attributes:
        questions: how many, of held-out scenes.
        level: of the scenes.
        modes: "pictures": the scene is shown; "words": told; "blind": neither.
        max_new_tokens: of an answer.
        samples: at a time.
        seed: of the questions.
    """

    questions: int = 512
    level: int = 1
    modes: tuple[str, ...] = MODES
    max_new_tokens: int = 80
    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.questions < 1 or self.max_new_tokens < 1 or self.samples < 1 or self.level not in LEVELS:
            raise InputError(f"benchmark: counts of at least 1 and a level of {list(LEVELS)}, got {self}")
        if not self.modes or set(self.modes) - set(MODES):
            raise InputError(f"benchmark.modes is {self.modes}; expected some of {', '.join(MODES)}")


def held_out(settings: QuestionBenchmark) -> list[tuple[Scene, Question]]:
    """The scenes and what is asked of them, in their order."""
    rng = random.Random(f"questions/{settings.level}/{settings.seed}")
    return [draw(rng, settings.level, "val") for _ in range(settings.questions)]


def outcomes(model: R1VModel, settings: QuestionBenchmark) -> dict[str, list[float]]:
    """Of each question and mode whether it was answered rightly (`right_<mode>`), whether the answer came to its end
    (`ended_<mode>`), and how many tokens it took (`length_<mode>`); the first and the last also of the questions
    of each kind alone (`right_pictures_count`)."""
    items = held_out(settings)
    kinds = [question.kind for _, question in items]
    found: dict[str, list[float]] = {}
    for mode in settings.modes:
        said = answers(model, items, mode, settings)
        end = model.tokenizer.eos_token_id
        texts = [model.tokenizer.decode([t for t in tokens.tolist() if t != end]) for tokens in said]
        right = [float(answer_of(text) == question.answer) for text, (_, question) in zip(texts, items, strict=True)]
        length = [float(len(tokens)) for tokens in said]
        found |= {f"right_{mode}": right, f"ended_{mode}": [float((tokens == end).any()) for tokens in said]}
        found[f"length_{mode}"] = length
        for kind in sorted(set(kinds)):
            own = [i for i, other in enumerate(kinds) if other == kind]
            found[f"right_{mode}_{kind}"] = [right[i] for i in own]
            found[f"length_{mode}_{kind}"] = [length[i] for i in own]
    return found


def means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means of outcomes."""
    return {name: fmean(values) for name, values in found.items()}


@torch.no_grad()
def answers(
    model: R1VModel, items: Sequence[tuple[Scene, Question]], mode: str, settings: QuestionBenchmark
) -> list[Tensor]:
    """Tokens of the likeliest answers."""
    own = Layout.of(model)
    decoding, engine = Decoding(settings.max_new_tokens, temperature=0.0), TransformersEngine()
    found: list[Tensor] = []
    for start in range(0, len(items), settings.samples):
        chunk = items[start : start + settings.samples]
        samples = [own.prompt([("user", asked(*each, mode))], shown(each[0], mode)) for each in chunk]
        found += [tokens.cpu() for tokens in engine.answers(model, samples, 1, decoding, 0)]
    return found


def asked(scene: Scene, question: Question, mode: str) -> str:
    """What a user says."""
    before = {"pictures": MARK, "words": in_words(scene, random.Random(scene.canonical)), "blind": ""}
    return f"{before[mode]}\n{question.text}".lstrip()


def shown(scene: Scene, mode: str) -> list[Tensor]:
    """The pictures that go with it."""
    return [torch.from_numpy(render(scene)).permute(2, 0, 1).contiguous()] if mode == "pictures" else []


def answer_of(text: str) -> str:
    """The answer in a text: boxed, introduced, after plain steps, or all that was said after thinking.

    >>> answer_of("top left, red circle. so red"), answer_of("red"), answer_of("a\\n</think>\\n\\\\boxed{2}")
    ('red', 'red', '2')
    """
    found = final_answer(text)
    if found is not None:
        return found.strip()
    said = split(text).said
    return said.rpartition(SO)[2].strip() if SO in said else said.strip()
