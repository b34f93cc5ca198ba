"""A judge's scores put into the records themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.executors.task import ScoreStep
from data_pipeline.records import Record, Rejected


@dataclass
class KeepScores:
    """Scores as metadata, under the names of their columns: what a model learns to predict belongs to its sample.

    A record without a score (its `*_note` says why) is rejected.

    Args:
        scorer: a step that scores, such as data_pipeline.steps.judge.VlmJudge.
    """

    scorer: ScoreStep
    batch_size: int = 256

    def rewrite(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """The records with their scores."""
        found: list[Record | Rejected] = []
        for record, scores in zip(records, self.scorer.score(records), strict=True):
            notes = [str(value) for name, value in scores.items() if name.endswith("_note") and value is not None]
            if notes:
                found.append(Rejected(record.key, "unscored", "; ".join(notes)))
            else:
                values = {name: value for name, value in scores.items() if not name.endswith("_note")}
                found.append(replace(record, metadata={**record.metadata, **values}))
        return found
