"""R1V's control of chain lengths (AL-CoTD, arXiv 2504.05599): what is easy to answer is told to be brief."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline import parquet
from data_pipeline.errors import InputError
from data_pipeline.index import TEXT_FIELDS, sidecars, state_of

logger = logging.getLogger(__name__)
SCORES = ("cot_vision", "cot_text", "cot_integration")
NOTE = "cot_note"
HIGHEST = 2.0  # of the penalty
MOST_UNSCORED = 0.5  # share of records; with more, scores are normalised by what is left by chance


def normalised(value: float, low: float, high: float) -> float:
    """A score on a scale from 0, the lowest of the data, to 1, the highest; 0.5 where all are equal.

    >>> normalised(3.0, 1.0, 5.0)
    0.5
    """
    return 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))


def hardness(scores: Sequence[float], beta: float = 1.0, gamma: float = 1.0) -> float:
    """(S_v + beta S_t + gamma S_I) / (1 + beta + gamma) of normalised scores S_v, S_t, S_I."""
    vision, text, integration = scores
    return (vision + beta * text + gamma * integration) / (1 + beta + gamma)


# R1V (arXiv 2504.05599), section 2.3, the dynamic reasoning length controller.
def penalty(hard: float, alpha: float) -> float:
    """min(2, exp(alpha (1 - hard))): 1, which penalises nothing, for the hardest question, exp(alpha) for the easiest.

    >>> round(penalty(0.5, alpha=0.4), 4), penalty(0.0, alpha=9.0)
    (1.2214, 2.0)
    """
    return min(HIGHEST, math.exp(alpha * (1 - hard)))


def end_bias(hard: float, strength: float, third: float) -> float:
    """strength x max(0, 1 - hard / third): none from `third` on, where the hard third begins.

    >>> end_bias(0.25, 4.0, 0.5), end_bias(0.6, 4.0, 0.5)
    (2.0, 0.0)
    """
    return strength * max(0.0, 1 - hard / third) if third > 0 else 0.0


def hard_third(values: Sequence[float]) -> float:
    """Where the highest third of values begins.

    >>> hard_third([0.1, 0.9, 0.2, 0.3, 0.8, 0.7])
    0.8
    """
    return sorted(values)[-(len(values) // 3)]


class Brevity(NamedTuple):
    """What makes an answer brief: a repetition penalty, and a bias on the logits of the end of thoughts."""

    penalty: float = 1.0
    end_bias: float = 0.0


@dataclass
class LengthControl:
    """How brief each record's answer shall be, from the columns that its scorer left in an index.

    R1V's control is the repetition penalty, whose constants it does not say; configs/evaluation/chain_lengths.yaml
    sweeps them. A penalty also falls on words that a chain must say again; the bias on the end of thoughts does not.

    Args:
        scores: folder of shards whose indexes have the columns `cot_vision`, `cot_text`, `cot_integration`, over all of
            which scores are normalised.
        alpha: how strong; 0 penalises nothing. Above ln 2 the limit of 2 binds.
        beta: weight of the text's score.
        gamma: weight of the integration's.
        end_bias: of the easiest question; 0 biases nothing.
    """

    scores: str
    alpha: float = 0.3
    beta: float = 1.0
    gamma: float = 1.0
    end_bias: float = 0.0

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta, self.gamma, self.end_bias) < 0:
            raise InputError(f"length control: alpha, beta, gamma and end_bias are at least 0; got {self}")

    @property
    def fingerprint(self) -> str:
        """Of the scores: what is generated depends on them."""
        return state_of(sidecars(Path(self.scores)))

    def brevities(self) -> dict[str, Brevity]:
        """Of each record that has scores, by its key. InputError where most have none."""
        rows = scored_records(Path(self.scores)).to_pylist()
        scored = [row for row in rows if all(row[name] is not None for name in SCORES)]
        self._check(rows, scored)
        limits = {name: (min(row[name] for row in scored), max(row[name] for row in scored)) for name in SCORES}
        if all(low == high for low, high in limits.values()):
            logger.warning("all %d records of %s have the same scores: one control for all", len(scored), self.scores)
        hard = [hardness([normalised(row[n], *limits[n]) for n in SCORES], self.beta, self.gamma) for row in scored]
        third = hard_third(hard)
        return {
            row["key"]: Brevity(penalty(h, self.alpha), end_bias(h, self.end_bias, third))
            for row, h in zip(scored, hard, strict=True)
        }

    def _check(self, rows: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]) -> None:
        """Names what is wrong where few records have scores."""
        lacking = len(rows) - len(scored)
        if not lacking:
            return
        reasons = Counter(str(row[NOTE])[:120] for row in rows if row.get(NOTE)).most_common(2)
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "no note says why"
        text = f"{lacking} of {len(rows)} records of {self.scores} have no scores of difficulty ({why})"
        if lacking > MOST_UNSCORED * len(rows):
            raise InputError(
                f"{text}; score them again: python -m data_pipeline score {self.scores} -c "
                "configs/data/score_chains.yaml"
            )
        logger.warning("%s", text)


def scored_records(folder: Path) -> pa.Table:
    """Keys and scores of all records of a folder, and why there are none."""
    tables = []
    for path in sidecars(folder):
        missing = [name for name in SCORES if name not in parquet.schema(path).names]
        if missing:
            raise InputError(
                f"{path} has no column {', '.join(missing)}; first run "
                f"`python -m data_pipeline score {folder} -c configs/data/score_chains.yaml`"
            )
        names = [*SCORES, *({NOTE} & set(parquet.schema(path).names))]
        table = parquet.read(path, ["key", "field", *names])
        tables.append(table.filter(pc.is_in(table["field"], pa.array(TEXT_FIELDS))).select(["key", *names]))
    return pa.concat_tables(tables, promote_options="permissive")
