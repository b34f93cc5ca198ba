"""Verifies any folder of WebDataset tars, ours or by others, and names every defect. Nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.progress import progress
from data_pipeline.records import Rejected
from data_pipeline.sources.protocol import Unit
from data_pipeline.sources.webdataset import WebDataset
from data_pipeline.steps.decode import Decode


def lint(path: Path, layout: str = "text_image", columns: Mapping[str, str | list[str]] | None = None) -> Iterator[str]:
    """One line for each defect, "TAR: SAMPLE: REASON: WHAT", as tars are read; every picture is decoded.

    `layout` and `columns` say what a sample by others is, as of data_pipeline.sources.WebDataset.
    """
    source, decode = WebDataset(str(path), layout, dict(columns or {})), Decode()
    units = [Unit(name, {"file": name}, "") for name, _ in source.tars()]  # hashing would read each tar twice
    keys: dict[str, str] = {}
    for unit in progress(units, len(units), "tars"):
        for item in source.read(unit):
            found = item if isinstance(item, Rejected) else decode(item)
            if isinstance(found, Rejected):
                yield f"{unit.name}: {found.key}: {found.reason}: {found.detail.removeprefix(f'{unit.name}: ')}"
                continue
            key = str(found.metadata.get("sample", found.key))
            if key in keys:
                yield f"{unit.name}: {key}: repeated_key: {keys[key]} has a sample of this key too"
            keys[key] = unit.name


def summary(defects: Counter[str]) -> str:
    """Counts of defects by reason."""
    return "\n".join(f"{count:>9,}  {reason}" for reason, count in defects.most_common())


def main(path: Path, layout: str = "text_image", columns: Mapping[str, str | list[str]] | None = None) -> int:
    """Prints every defect and their counts; the exit status is 1 if there is any."""
    if not Path(path).exists():
        raise InputError(f"there is nothing at {path}; expected a tar or a folder of tars")
    defects: Counter[str] = Counter()
    for line in lint(path, layout, columns):
        print(line)
        defects[line.split(": ")[2]] += 1
    print(summary(defects) if defects else f"{path}: no defect")
    return 1 if defects else 0
