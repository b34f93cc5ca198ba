"""What a run's data options may be: what would train on something else than was meant is refused or told."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, kept_ids

logger = logging.getLogger(__name__)
Folders = Mapping[str, Sequence[str]]  # folders of shards by the name of their set


def check_least(least: int, **numbers: int | None) -> None:
    """Refuses numbers below a bound; None is none."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise InputError(f"data.{name} is {number}; expected at least {least}")


def check_held_out(share: float) -> None:
    """Refuses what is no share of the records to hold out."""
    if not 0 <= share < 1:
        raise InputError(f"data.val_fraction is {share}; expected a share from 0 to less than 1")


def check_ratio(ratio: Mapping[str, float] | None) -> None:
    """Refuses a ratio by which nothing, or no one knows what, would be trained on."""
    if ratio is None:
        return
    if not all(math.isfinite(share) and share >= 0 for share in ratio.values()) or not any(ratio.values()):
        raise InputError(
            f"data.ratio is {dict(ratio)}; expected numbers of 0 or more by sets, one of them above 0, or no ratio, "
            "which takes each set in turn"
        )


def tell_of_ratio(ratio: Mapping[str, float], sets: Collection[str]) -> None:
    """Says which sets are not trained on, and which names of a ratio are of no set."""
    if absent := sorted(set(sets) - set(ratio)):
        logger.warning("data.ratio leaves out %s: they are not trained on", ", ".join(absent))
    if unknown := sorted(set(ratio) - set(sets)):
        logger.warning("data.ratio names %s, of which there are no records", ", ".join(unknown))


def check_once(folders: Folders) -> None:
    """Refuses a folder that is named twice: each of its records would come twice."""
    named = [(folder, Path(folder).resolve()) for many in folders.values() for folder in many]
    seen = [path for _, path in named]
    if twice := [folder for folder, path in named if seen.count(path) > 1]:
        raise InputError(f"data.shards names a folder more than once: {', '.join(twice)}")


def selected(folders: Folders) -> str:
    """How many records selections keep, for who finds none; "" where nothing was selected."""
    found = ((folder, kept_ids(Path(folder))) for many in folders.values() for folder in many)
    counts = [f"{Path(folder) / KEEP} keeps {len(ids):,} records" for folder, ids in found if ids is not None]
    return f"; {', '.join(counts)}: select again by looser rules, or delete it" if counts else ""
