"""Questions about held-out scenes, answered exactly or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from data_pipeline.scenes.renderer import render
from data_pipeline.scenes.visual_questions import Question

TOKENS = 64  # of an answer, at most
Pictures = Sequence[Image.Image | None]


class Answerer(Protocol):
    """A pipeline that can be asked."""

    def ask(self, question: Sequence[str], image: Pictures, max_new_tokens: int) -> list[str]:
        """An answer to each question about its picture."""
        ...


def score_answers(pipeline: Answerer, questions: Sequence[Question], batch_size: int) -> list[float]:
    """Of each question whether it is answered word for word."""
    found: list[float] = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        pictures = [None if q.scene is None else Image.fromarray(render(q.scene)) for q in chunk]
        answers = pipeline.ask([q.text for q in chunk], pictures, TOKENS)
        found += [float(answer == q.answer) for answer, q in zip(answers, chunk, strict=True)]
    return found
