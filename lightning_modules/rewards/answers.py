"""Rewards of answers in words: right or wrong by a verifier, well-formed or not, too long or not.

A verifier's own failure (its time is up, the record's answer cannot be read) is a failure with a name and never a
number: in other trainers timeouts that were swallowed made every reward 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from data_pipeline.chains import CLOSE, OPEN, boxes, final_answer, split
from data_pipeline.errors import InputError
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.quantities import agree, plain, plausible, quantity
from lightning_modules.rewards.sandbox import Sandbox

Kind = Literal["auto", "choice", "number", "math", "text"]
LONGEST = 2000  # characters of an answer that is looked at
LETTERS = "ABCDEFGHIJ"
# A letter alone, as (B), B. or \text{B}, or before what it stands for.
LETTER = re.compile(r"(?:option|choice)?\s{0,3}[\(\[]?([A-J])(?:[\)\].:]|\s{0,3}$)", re.IGNORECASE)
SEVERAL = re.compile(r"[\(\[]?([A-J])[\)\]]?(?:\s{0,3}(?:,|and|&)?\s{0,3}[\(\[]?([A-J])[\)\]]?){1,9}\.?")


# Verdicts that are no numbers: the record's own answer cannot be read, or the comparison came to no end.
FAILURES = ("truth", "timeout", "crash", "memory", "too_deep")


class Verdict(NamedTuple):
    """What an answer is worth, 1 or 0, and why: "right", "wrong", "no_answer", "unparsed", "too_long"; or no number and
    the name of a verifier's failure (FAILURES).

    An answer of the model that cannot be read is wrong: it was asked for one that can. A record's answer that cannot be
    read, or a comparison that fails, says nothing of the model, whatever it answered.
    """

    value: float | None
    reason: str


@runtime_checkable
class TextReward(Protocol):
    """Scores texts; a larger number is a better text."""

    def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
        """One finite number for each text; None where it could not be found, never a number in its place."""


@dataclass
class Verifier:
    """Compares an answer with the record's.

    Args:
        tolerance: share of a number by which an answer may be off; a record's "tolerance" goes before it.
        unparsed: what an answer is worth that has no mathematical reading: "wrong", or "unknown" for no number at all.
        seconds: for one comparison of formulas.
        workers: comparisons of formulas at a time.
    """

    tolerance: float = 1e-6
    unparsed: Literal["wrong", "unknown"] = "wrong"
    seconds: float = 0.6
    workers: int = 2
    _sandbox: Sandbox | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1 or self.seconds <= 0 or self.workers < 1:
            raise InputError(f"verifier: tolerance from 0 to below 1, seconds and workers above 0; got {self}")
        self._sandbox = Sandbox(self.workers, self.seconds)

    def verify(
        self,
        text: str,
        truth: str,
        kind: Kind = "auto",
        choices: Mapping[str, str] | None = None,
        tolerance: float | None = None,
    ) -> Verdict:
        """The verdict on a whole text, whose final answer is looked for."""
        if not readable(truth, kind, choices):
            return Verdict(None, "truth")
        said = final_answer(text)
        if said is None:
            return Verdict(0.0, "no_answer")
        if len(said) > LONGEST:
            return Verdict(0.0, "too_long")
        return self.compare(said, truth, kind, choices, tolerance)

    def compare(
        self,
        said: str,
        truth: str,
        kind: Kind = "auto",
        choices: Mapping[str, str] | None = None,
        tolerance: float | None = None,
    ) -> Verdict:
        """The verdict on an answer alone."""
        if not readable(truth, kind, choices):
            return Verdict(None, "truth")
        kind = kind_of(truth, choices) if kind == "auto" else kind
        if kind == "choice":
            return verdict(letters(said, choices) == letters(truth, choices))
        if words(said) == words(truth):
            return verdict(True)
        if kind == "text":
            return verdict(False)
        wanted, found = quantity(truth), quantity(said)
        units = [each.unit for each in (wanted, found) if each is not None]
        if len(units) == 2 and (kind == "number" or all(map(plausible, units))):
            assert wanted is not None and found is not None
            return verdict(agree(wanted, found, self.tolerance if tolerance is None else tolerance))
        if kind == "number":
            return self.unread(said)
        return self.formulas(said, truth)

    def unread(self, said: str) -> Verdict:
        """Of an answer that is no number."""
        return Verdict(0.0 if self.unparsed == "wrong" else None, "unparsed")

    def formulas(self, said: str, truth: str) -> Verdict:
        """By math-verify in a process of its own."""
        assert self._sandbox is not None
        reason = self._sandbox.compare(cleaned(truth), cleaned(said))
        if reason == "unparsed":
            return self.unread(said)
        return Verdict({"right": 1.0, "wrong": 0.0}.get(reason), reason)


@dataclass
class Accuracy:
    """1 for a right answer and 0 for any other, by the record's "answer" (and "answer_kind", "choices", "tolerance").

    Args:
        verifier: what compares.

    `counts` is how often each reason came; who logs them clears it. `requires` is what a record's metadata must hold.
    """

    requires = ("answer",)
    verifier: Verifier = field(default_factory=Verifier)
    counts: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
        """The verdicts' values."""
        found = [self.one(text, request) for text, request in zip(texts, requests, strict=True)]
        self.counts.update(verdict.reason for verdict in found)
        return [verdict.value for verdict in found]

    def one(self, text: str, request: Request) -> Verdict:
        """Of one text."""
        facts = request.metadata
        if not isinstance(facts.get("answer"), str | int | float):
            raise InputError(
                f"Accuracy got {request.prompt[:80]!r} with the facts {sorted(facts)}; expected records whose metadata "
                'hold "answer"'
            )
        named = facts.get("answer_kind", "auto"), facts.get("choices"), facts.get("tolerance")
        return self.verifier.verify(text, str(facts["answer"]), *named)


# DeepSeek-R1 (arXiv 2501.12948), section 2.2.2: rewards of form besides those of accuracy.
@dataclass
class Format:
    """1 for a text that thinks, ends its thinking once, and then answers in a box; else 0.

    Args:
        boxed: whether the answer must stand in a box.
    """

    boxed: bool = True

    def score(self, texts: Sequence[str], requests: Sequence[Request]) -> list[float | None]:
        """1 or 0 of each."""
        return [float(self.well_formed(text)) for text in texts]

    def well_formed(self, text: str) -> bool:
        """Templates may have written the opening mark, so it may be missing, but not come twice."""
        chain = split(text)
        once = text.count(CLOSE) == 1 and text.count(OPEN) <= text.lstrip().startswith(OPEN)
        return once and bool(chain.thought.strip()) and bool(boxes(chain.said) if self.boxed else chain.said.strip())


# DAPO (arXiv 2503.14476), equation 13.
def soft_overlong(length: int, longest: int, buffer: int) -> float:
    """0 up to longest - buffer tokens, then falling to -1 at `longest` and beyond."""
    return min(0.0, max(-1.0, (longest - buffer - length) / buffer)) if buffer else -float(length > longest)


def verdict(same: bool) -> Verdict:
    """Of a comparison that was made."""
    return Verdict(float(same), "right" if same else "wrong")


def kind_of(truth: str, choices: Mapping[str, str] | None) -> Kind:
    """What a record's answer is, by its looks."""
    if choices or re.fullmatch(r"\(?[A-J]\)?", truth.strip()):
        return "choice"
    if (found := quantity(truth)) is not None and (found.unit == "" or found.unit.replace(" ", "").isalpha()):
        return "math"  # which compares quantities first
    return "text" if re.fullmatch(r"[A-Za-z][A-Za-z' -]*[A-Za-z]", truth.strip()) else "math"


def readable(truth: str, kind: Kind, choices: Mapping[str, str] | None) -> bool:
    """Whether a record's answer can be compared with; formulas are read by the worker that compares them."""
    kind = kind_of(truth, choices) if kind == "auto" else kind
    if kind == "choice":
        return bool(letters(truth, choices))
    return bool(words(truth)) and (kind != "number" or quantity(truth) is not None)


def words(text: str) -> str:
    """A text as it is compared: without case, LaTeX's wrapping, articles, and punctuation at its ends."""
    text = re.sub(r"^(?:the|a|an)\s+", "", plain(text).strip(" .。!\"'`").lower())
    return re.sub(r"\s+", " ", text)


def letters(text: str, choices: Mapping[str, str] | None) -> frozenset[str]:
    """The options that an answer names, by letter or by what they say; none where that cannot be told."""
    bare = plain(text).strip().strip("*").strip()
    if SEVERAL.fullmatch(bare.upper().replace("AND", "and")) and not bare.islower():
        return frozenset(re.findall(r"[A-J]", bare.upper().replace("AND", "")))
    named = {name.upper(): words(str(said)) for name, said in (choices or {}).items()}
    if by_text := {name for name, said in named.items() if said == words(bare)}:
        return frozenset(by_text)
    found = LETTER.match(bare)
    if found is None or (named and found[1].upper() not in named):
        return frozenset()
    rest = words(bare[found.end() :])
    if rest and named and rest != named[found[1].upper()] and rest in named.values():
        return frozenset()  # the letter says one thing and the text another
    return frozenset(found[1].upper())


def cleaned(text: str) -> str:
    """A formula without what surrounds it in prose."""
    text = text.strip()
    for opened, closed in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opened) and text.endswith(closed) and len(text) > len(opened) + len(closed):
            text = text[len(opened) : -len(closed)].strip()
    return text.rstrip(".").replace("−", "-").replace("√", "\\sqrt").replace("π", "\\pi ").replace("\\dfrac", "\\frac")
