"""Arms of an experiment beside each other: figures over seeds, and gains over a baseline on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from data_pipeline.errors import InputError
from lightning_modules.evaluation.intervals import Interval, paired_bootstrap, t_interval

Columns = Mapping[str, Sequence[str]]  # title -> outcomes, the best of which is taken


@dataclass(frozen=True)
class Trial:
    """What one seed of an arm came to.

    Attributes:
        outcomes: of each item, by name; all trials judge the same items in the same order.
        evaluations: of the transformer, over the whole chain.
        seconds: of training, over the whole chain.
    """

    outcomes: Mapping[str, Sequence[float]]
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Figure:
    """A column of an arm.

    Attributes:
        outcome: the one that was taken.
        value: mean over seeds, with Student's interval.
        gain: over the baseline's, with the paired bootstrap's interval over items.
        gains: of each seed.
    """

    outcome: str
    value: Interval
    gain: Interval
    gains: list[float]


@dataclass(frozen=True)
class Row:
    """An arm: how many of its trials are there, of how many, and its columns by title."""

    arm: str
    trials: int
    wanted: int
    evaluations: float
    seconds: float
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Stage:
    """What an arm adds to an earlier one: the gain of each column, with the paired bootstrap's interval over items."""

    arm: str
    before: str
    gains: dict[str, Interval]


def compare(
    trials: Mapping[str, Sequence[Trial]], wanted: Mapping[str, int], columns: Columns, baseline: str
) -> list[Row]:
    """A row for each arm with trials; nothing without trials of the baseline."""
    if not trials.get(baseline):
        return []
    rows = []
    for arm, found in trials.items():
        if found:
            figures = {title: figure(found, trials[baseline], names, arm) for title, names in columns.items()}
            cost = fmean(t.evaluations for t in found), fmean(t.seconds for t in found)
            rows.append(Row(arm, len(found), wanted[arm], *cost, figures))
    return rows


def stages(trials: Mapping[str, Sequence[Trial]], columns: Columns, after: Mapping[str, str]) -> list[Stage]:
    """What each arm adds to the one that `after` names, where both have trials."""
    return [
        Stage(
            arm,
            before,
            {title: figure(trials[arm], trials[before], names, arm).gain for title, names in columns.items()},
        )
        for arm, before in after.items()
        if trials.get(arm) and trials.get(before)
    ]


def figure(found: Sequence[Trial], others: Sequence[Trial], names: Sequence[str], arm: str) -> Figure:
    """The best of these outcomes of an arm, against the best of the baseline."""
    taken, other = best(found, names, arm), best(others, names, arm)
    base = items(others, other)
    if len(base) != len(items(found, taken)):
        raise InputError(f"{arm} was judged on other items than the baseline ({taken}); run both on one benchmark")
    means = [fmean(trial.outcomes[taken]) for trial in found]
    gain = paired_bootstrap(items(found, taken).tolist(), base.tolist())
    return Figure(taken, t_interval(means), gain, [mean - float(base.mean()) for mean in means])


def best(trials: Sequence[Trial], names: Sequence[str], arm: str) -> str:
    """The name whose mean over trials and items is highest, the first of equals."""
    for name in names:
        if any(name not in trial.outcomes for trial in trials):
            there = ", ".join(trials[0].outcomes) or "nothing"
            raise InputError(f"{arm} has no outcome {name}; there is {there}: correct the columns, or its benchmark")
    return max(names, key=lambda name: items(trials, name).mean())


def items(trials: Sequence[Trial], name: str) -> np.ndarray:
    """Of each item its mean outcome over trials."""
    return np.mean([trial.outcomes[name] for trial in trials], axis=0)


def markdown(
    rows: Sequence[Row],
    baseline: str,
    reported: Mapping[str, Mapping[str, float]] | None = None,
    added: Sequence[Stage] = (),
) -> str:
    """The table, and how to read it; `reported` are a paper's figures of arms by title, in columns of their own.

    What is `added` stage by stage stands in a table below.
    """
    if not rows:
        return f"No run of the baseline {baseline} is finished: there is nothing to compare with.\n"
    titles, told = list(rows[0].figures), reported or {}
    papers = list(dict.fromkeys(title for figures in told.values() for title in figures))
    spends = any(row.evaluations for row in rows)  # a language model has no transformer whose evaluations count
    heads = ["arm", "seeds", *titles, *(f"paper: {title}" for title in papers)]
    heads += ["evaluations", "minutes"] if spends else ["minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        seeds = str(row.trials) if row.trials == row.wanted else f"{row.trials} of {row.wanted}"
        cells = [cell(row.figures[title], row.arm == baseline) for title in titles]
        cells += [f"{told[row.arm][title]:g}" if title in told.get(row.arm, {}) else "" for title in papers]
        cost = [f"{row.evaluations / 1000:.0f}k", f"{row.seconds / 60:.1f}"] if spends else [f"{row.seconds / 60:.1f}"]
        lines.append("| " + " | ".join([row.arm, seeds, *cells, *cost]) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "± is half of Student's 95 % interval over seeds. In brackets stands the gain over "
            f"`{baseline}` with a paired bootstrap's 95 % interval over the benchmark's items. Where a column takes "
            "the best of several, each arm's own best is taken. Cost is that of all links after the base.",
            "",
            *stage_table(added),
        ]
    )


def stage_table(added: Sequence[Stage]) -> list[str]:
    """Lines that say what each stage adds."""
    if not added:
        return []
    heads = ["arm", "after", *added[0].gains]
    lines = ["What each stage adds to the one before it, with a paired bootstrap's 95 % interval over items:", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for stage in added:
        cells = [f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" for gain in stage.gains.values()]
        lines.append("| " + " | ".join([stage.arm, stage.before, *cells]) + " |")
    return [*lines, ""]


def record(row: Row) -> dict[str, Any]:
    """A row as plain data; bounds are null where one seed gives none."""
    columns = {
        title: {
            "outcome": found.outcome,
            "mean": found.value.mean,
            "interval": None if math.isinf(found.value.high) else found.value[1:],
            "gain": found.gain.mean,
            "gain_interval": found.gain[1:],
            "gains": found.gains,
        }
        for title, found in row.figures.items()
    }
    return {**vars(row), "figures": columns}


def cell(found: Figure, alone: bool) -> str:
    """A figure in words: 0.871 ± 0.020 (+0.149, +0.112 to +0.186)."""
    value, gain = found.value, found.gain
    spread = "" if math.isinf(value.high) else f" ± {value.high - value.mean:.3f}"
    return f"{value.mean:.3f}{spread}" + ("" if alone else f" ({gain.mean:+.3f}, {gain.low:+.3f} to {gain.high:+.3f})")
