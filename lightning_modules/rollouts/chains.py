"""Questions, the answers that were sampled to them, and batches of answers to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Question:
    """What a policy is asked.

    Attributes:
        key: of the record.
        sample_id, epoch: counters of the record, for draws.
        prompt: as a person reads it.
        input_ids: (L,) int64, the tokens up to where the answer begins, pictures' tokens included.
        tiles: (n, 3, h, w) fp32 of its pictures, normalised as the tower takes them; None without.
        metadata: the record's facts, for rewards.

    >>> Question("q", 0, 0, "how many?", torch.tensor([5, 6])).tiles is None
    True
    """

    key: str
    sample_id: int
    epoch: int
    prompt: str
    input_ids: Int[Tensor, " l"]
    tiles: Float[Tensor, "n 3 h w"] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """One sampled answer, and all that learning from it needs.

    Attributes:
        question: what was asked.
        tokens: (T,) int64, the end of the turn included where it was reached.
        ended: whether it was; else the answer was cut off.
        old: (T,) log-probabilities under the policy that sampled, computed by the code that trains.
        reference: (T,) the same under the reference; None where none is needed.
        reward: the weighted sum of its rewards.
        advantage: of its group.
        update: number of updates before it was sampled.
    """

    question: Question
    tokens: Int[Tensor, " t"]
    ended: bool
    old: Float[Tensor, " t"] | None = None
    reference: Float[Tensor, " t"] | None = None
    reward: float = float("nan")
    advantage: float = 0.0
    update: int = 0

    def of_question(self, question: Question) -> Answer:
        """The answer on the device of its question."""
        device = question.input_ids.device
        tensors = {n: t.to(device) for n in ("tokens", "old", "reference") if (t := getattr(self, n)) is not None}
        return replace(self, question=question, **tensors)

    def state(self) -> dict[str, Any]:
        """As plain data and tensors, for checkpoints."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"question": dict(vars(self.question))}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Answer:
        """The inverse of `state`."""
        return cls(**{**state, "question": Question(**state["question"])})


def moved(answers: Sequence[Answer], device: torch.device | str) -> list[Answer]:
    """Answers with their tensors on a device; those to one question share it, as when they were sampled."""
    questions: dict[tuple[str, int], Question] = {}
    for q in (answer.question for answer in answers):
        if (q.key, q.epoch) not in questions:
            tensors = {n: t.to(device) for n in ("input_ids", "tiles") if (t := getattr(q, n)) is not None}
            questions[q.key, q.epoch] = replace(q, **tensors)
    return [answer.of_question(questions[answer.question.key, answer.question.epoch]) for answer in answers]


@dataclass
class Prompts:
    """B questions, padded on the left.

    Attributes:
        input_ids: (B, L).
        mask: (B, L), 0 where padded.
        tiles: (N, 3, h, w) of all pictures that differ, or None.
        rows: which of these each question's are, in the order of its tokens.
    """

    input_ids: Int[Tensor, "b l"]
    mask: Int[Tensor, "b l"]
    tiles: Tensor | None
    rows: list[list[int]]

    def spread(self, features: Float[Tensor, "n k d"] | None) -> Float[Tensor, "m k d"] | None:
        """Features of the tiles, once for each question that shows them."""
        if features is None:
            return None
        return features[[row for rows in self.rows for row in rows]]


@dataclass
class Batch:
    """B answers with their questions, to learn from.

    Attributes:
        prompts: of B questions.
        tokens: (B, T), padded on the right.
        mask: (B, T), 1 for tokens that are learned from.
        old, reference: (B, T) log-probabilities; `reference` is None where none is needed.
        advantages: (B,).
        lengths: (B,) tokens of each answer.
        longest: tokens that an answer may have.
    """

    prompts: Prompts
    tokens: Int[Tensor, "b t"]
    mask: Float[Tensor, "b t"]
    old: Float[Tensor, "b t"]
    reference: Float[Tensor, "b t"] | None
    advantages: Float[Tensor, " b"]
    lengths: Float[Tensor, " b"]
    longest: int


def left_padded(questions: Sequence[Question], pad: int) -> Prompts:
    """Questions as one batch; a question that comes several times shares its tiles."""
    ids = pad_sequence([q.input_ids for q in questions], batch_first=True, padding_value=pad, padding_side="left")
    ones = [torch.ones_like(q.input_ids) for q in questions]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    first: dict[int, int] = {}
    tiles: list[Tensor] = []
    rows: list[list[int]] = []
    for question in questions:
        if question.tiles is None:
            rows.append([])
            continue
        if id(question.tiles) not in first:
            first[id(question.tiles)] = sum(len(each) for each in tiles)
            tiles.append(question.tiles)
        start = first[id(question.tiles)]
        rows.append(list(range(start, start + len(question.tiles))))
    return Prompts(ids, mask, torch.cat(tiles) if tiles else None, rows)


def batched(answers: Sequence[Answer], pad: int, longest: int, cut_off: bool) -> Batch:
    """Answers as one batch.

    Args:
        answers: with what was computed of them.
        pad: the token that stands where nothing is.
        longest: tokens that an answer may have.
        cut_off: whether answers that were cut off are learned from.
    """
    tokens = pad_sequence([a.tokens for a in answers], batch_first=True, padding_value=pad)
    exact: Any = {"dtype": torch.float32, "device": tokens.device}  # whatever the precision of the weights
    weights = [torch.full(a.tokens.shape, float(cut_off or a.ended), **exact) for a in answers]
    references = [a.reference for a in answers if a.reference is not None]
    old = [a.old if a.old is not None else torch.zeros_like(w) for a, w in zip(answers, weights, strict=True)]
    return Batch(
        left_padded([a.question for a in answers], pad),
        tokens,
        pad_sequence(weights, batch_first=True),
        pad_sequence(old, batch_first=True),
        pad_sequence(references, batch_first=True) if len(references) == len(answers) else None,
        torch.tensor([a.advantage for a in answers], **exact),
        torch.tensor([len(a.tokens) for a in answers], **exact),
        longest,
    )
