"""python -m lightning_modules.evaluation.chain_lengths -c configs/evaluation/chain_lengths.yaml

What controls of chain lengths do to easy and to hard questions about held-out scenes. Easy and hard are the lowest and
the highest third by the weighted scores that the control itself goes by.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from jsonargparse import ArgumentParser

from data_pipeline.errors import InputError
from data_pipeline.length_control import SCORES, end_bias, hard_third, hardness, normalised, penalty
from data_pipeline.records import EncodedImage, ReasoningRecord
from data_pipeline.scenes.questions import Question
from data_pipeline.scenes.world import Scene
from data_pipeline.steps.chain_scores import SceneChainScores
from lightning_modules.evaluation.questions import QuestionBenchmark, answer_of, asked, held_out, shown
from lightning_modules.networks.layout import Layout
from lightning_modules.networks.loading import CheckpointError
from lightning_modules.networks.r1v import R1VModel
from lightning_modules.pipelines.answering import Decoding, TransformersEngine

STEP = 0.02  # penalties are rounded to multiples of it, so that questions of nearly one penalty share a batch
SHORTER, RIGHT, HARD = 0.2, 0.02, 0.05  # easy chains shorter by, accuracy within, hard chains' lengths within


@dataclass
class Sweep:
    """What is tried.

    Attributes:
        pretrained: an R1V folder that thinks before it answers.
        mode: "pictures" or "words".
        questions: of held-out scenes.
        alphas: strengths of the paper's penalty.
        weights: beta and gamma of each.
        end_biases: strengths of the other control, which adds `end_bias` to the logits of the end of thoughts.
        max_new_tokens: of an answer.
        samples: at a time.
        output: a Markdown file.
    """

    pretrained: str
    mode: str = "pictures"
    questions: int = 384
    alphas: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4, 0.693])
    weights: list[tuple[float, float]] = field(default_factory=lambda: [(1.0, 1.0)])
    end_biases: list[float] = field(default_factory=list)
    max_new_tokens: int = 96
    samples: int = 128
    output: str = "runs/chain_lengths.md"

    def __post_init__(self) -> None:
        if self.mode not in ("pictures", "words"):
            raise InputError(f"mode is {self.mode!r}; expected pictures or words")
        if min(self.questions, self.samples, self.max_new_tokens) < 1 or not self.weights:
            raise InputError("questions, samples and max_new_tokens are at least 1, and weights has a pair")
        if min(*self.alphas, *self.end_biases, *sum(self.weights, ()), 0.0) < 0:
            raise InputError("alphas, weights and end_biases are at least 0")


class Said(NamedTuple):
    """Tokens of an answer and whether it is right."""

    tokens: int
    right: bool


class Row(NamedTuple):
    """One setting: mean tokens of easy and hard chains over those without control, and changes of accuracy."""

    control: str
    alpha: float
    beta: float
    gamma: float
    easy_length: float
    hard_length: float
    easy_right: float
    hard_right: float

    @property
    def meets(self) -> bool:
        """Easy chains at least 20 % shorter, accuracy within .02, hard chains within 5 %."""
        kept = min(self.easy_right, self.hard_right) >= -RIGHT
        return self.easy_length <= 1 - SHORTER and kept and abs(self.hard_length - 1) <= HARD + 1e-9


def scores(items: Sequence[tuple[Scene, Question]], mode: str) -> list[list[float]]:
    """S_v, S_t and S_I of each question, each normalised over all."""
    pictures = (EncodedImage(b"", "png"),) if mode == "pictures" else ()
    facts = [{"scene": s.canonical, "question": q.kind, "hops": q.hops} for s, q in items]
    rows = SceneChainScores().score([ReasoningRecord(str(i), pictures, (), metadata=f) for i, f in enumerate(facts)])
    columns = {name: [float(row[name]) for row in rows] for name in SCORES}
    limits = {name: (min(values), max(values)) for name, values in columns.items()}
    return [[normalised(row[name], *limits[name]) for name in SCORES] for row in rows]


def said(
    model: R1VModel, items: Sequence[tuple[Scene, Question]], decodings: Sequence[Decoding], sweep: Sweep
) -> list[Said]:
    """Each question's answer under its own decoding."""
    layout, engine = Layout.of(model), TransformersEngine()
    groups: dict[Decoding, list[int]] = defaultdict(list)
    for i, decoding in enumerate(decodings):
        groups[decoding].append(i)
    found: dict[int, Said] = {}
    for decoding, members in groups.items():
        for start in range(0, len(members), sweep.samples):
            part = members[start : start + sweep.samples]
            own = [items[i] for i in part]
            prompts = [layout.prompt([("user", asked(*each, sweep.mode))], shown(each[0], sweep.mode)) for each in own]
            for i, tokens in zip(part, engine.answers(model, prompts, 1, decoding, 0), strict=True):
                text = model.tokenizer.decode([t for t in tokens.tolist() if t != model.tokenizer.eos_token_id])
                found[i] = Said(len(tokens), answer_of(str(text)) == items[i][1].answer)
    return [found[i] for i in range(len(items))]


def decoding_for(control: str, strength: float, sweep: Sweep) -> Decoding:
    """The likeliest answer under a penalty P, or under a bias of `strength`."""
    if control == "repetition":
        return Decoding(sweep.max_new_tokens, 0.0, repetition_penalty=round(strength / STEP) * STEP)
    return Decoding(sweep.max_new_tokens, 0.0, end_bias=round(strength, 1))


def compared(
    name: str, setting: tuple[float, float, float], hard: list[float], before: list[Said], after: list[Said]
) -> Row:
    """A row of the table."""
    order = sorted(range(len(hard)), key=hard.__getitem__)
    third = len(order) // 3
    parts = {"easy": order[:third], "hard": order[-third:]}
    lengths, rights = {}, {}
    for part, members in parts.items():
        lengths[part] = fmean(after[i].tokens for i in members) / fmean(before[i].tokens for i in members)
        rights[part] = fmean(after[i].right for i in members) - fmean(before[i].right for i in members)
    return Row(name, *setting, lengths["easy"], lengths["hard"], rights["easy"], rights["hard"])


def run(sweep: Sweep) -> list[Row]:
    """All settings."""
    items = held_out(QuestionBenchmark(sweep.questions))
    model, values = R1VModel.from_folder(sweep.pretrained), scores(items, sweep.mode)
    before = said(model, items, [decoding_for("repetition", 1.0, sweep)] * len(items), sweep)
    rows = []
    for beta, gamma in sweep.weights:
        hard = [hardness(v, beta, gamma) for v in values]
        for alpha in sweep.alphas:
            each = [decoding_for("repetition", penalty(h, alpha), sweep) for h in hard]
            setting = alpha, beta, gamma
            rows.append(compared("repetition", setting, hard, before, said(model, items, each, sweep)))
            print(line(rows[-1]), flush=True)
    beta, gamma = sweep.weights[0]
    hard = [hardness(v, beta, gamma) for v in values]
    third = hard_third(hard)
    for strength in sweep.end_biases:
        each = [decoding_for("end", end_bias(h, strength, third), sweep) for h in hard]
        rows.append(compared("end of thoughts", (strength, beta, gamma), hard, before, said(model, items, each, sweep)))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of Markdown."""
    numbers = f"{row.alpha:g} | {row.beta:g} | {row.gamma:g} | {row.easy_length:.2f} | {row.hard_length:.2f}"
    rights = f"{row.easy_right:+.3f} | {row.hard_right:+.3f}"
    return f"| {row.control} | {numbers} | {rights} | {'yes' if row.meets else ''} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table; 2 after a user's mistake."""
    parser = ArgumentParser(prog="python -m lightning_modules.evaluation.chain_lengths", description=__doc__)
    parser.add_argument("-c", "--config", action="config")
    parser.add_class_arguments(Sweep)
    given = parser.parse_args(argv)
    try:
        sweep = Sweep(**{name: given[name] for name in Sweep.__dataclass_fields__})
        rows = run(sweep)
    except (InputError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    titles = "control | alpha | beta | gamma | easy length | hard length | easy right | hard right | meets the bar"
    table = [f"| {titles} |", "|" + " --- |" * 9, *map(line, rows)]
    output = Path(sweep.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(table) + "\n")
    print(f"look at {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
