"""Verifies any folder of WebDataset tars, ours or by others, and names every defect. Nothing is changed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from data_pipeline import parquet
from data_pipeline.errors import InputError
from data_pipeline.index import COLUMNS, sample_id, sidecar
from data_pipeline.manifest import MANIFEST, built_shards
from data_pipeline.progress import progress
from data_pipeline.records import SPELT, Rejected
from data_pipeline.shards import upright_size
from data_pipeline.sources.folder import extension_of
from data_pipeline.sources.protocol import Unit
from data_pipeline.sources.webdataset import WebDataset
from data_pipeline.steps.decode import Decode


def lint(path: Path, layout: str = "text_image", columns: Mapping[str, str | list[str]] | None = None) -> Iterator[str]:
    """One line for each defect, "TAR: SAMPLE: REASON: WHAT", as tars are read; every picture is decoded.

    `layout` and `columns` say what a sample by others is, as of data_pipeline.sources.WebDataset.
    """
    source, decode = WebDataset(str(path), layout, dict(columns or {})), Decode()
    tars = source.tars()
    keys: dict[str, str] = {}
    yield from manifest_defects([tar for _, tar in tars])
    for name, tar in progress(tars, len(tars), "tars"):
        try:
            for item in source.read(Unit(name, {"file": name}, "")):  # not source.units(), which hash what is read here
                found = item if isinstance(item, Rejected) else decode(item)
                if isinstance(found, Rejected):
                    yield f"{name}: {found.key}: {found.reason}: {found.detail.removeprefix(f'{name}: ')}"
                    continue
                key = str(found.metadata.get("sample", found.key))
                if key in keys:
                    yield f"{name}: {key}: repeated_key: {keys[key]} has a sample of this key too"
                keys[key] = name
            yield from index_defects(name, tar)
        except InputError as error:  # of the index beside it
            yield f"{name}: {sidecar(tar).name}: damaged_index: {error}"


def manifest_defects(tars: Sequence[Path]) -> Iterator[str]:
    """Where the tars of a build are not those that its manifest names, or it is unfinished."""
    for folder in dict.fromkeys(tar.parent for tar in tars):
        try:
            built = built_shards(folder)
        except InputError as error:
            yield f"{folder.name}: {MANIFEST}: no_manifest: {error}"
            continue
        if built is None:
            continue
        here = [tar for tar in tars if tar.parent == folder]
        for name in sorted(set(built) - {tar.name for tar in here}):
            yield f"{name}: {MANIFEST}: missing_tar: it is named there"
        for tar in here:
            if tar.name not in built:
                yield f"{tar.name}: {MANIFEST}: unknown_tar: it is not named there"
            elif not sidecar(tar).is_file():
                yield f"{tar.name}: {sidecar(tar).name}: no_index: training reads by it"


def index_defects(name: str, tar: Path) -> Iterator[str]:
    """What training would read wrongly by the index beside a tar, which it trusts: places, sizes, pixels and hashes."""
    if not sidecar(tar).is_file():
        return
    end = tar.stat().st_size
    with open(tar, "rb") as file:
        for row in parquet.read(sidecar(tar), COLUMNS).to_pylist():
            place = f"{name}: {row['key']}: wrong_index: {row['field']}"
            if not 0 <= row["offset"] <= row["offset"] + row["size"] <= end:
                yield f"{place} is said to lie at {row['offset']}, {row['size']} bytes; the tar has {end}"
                continue
            file.seek(row["offset"])
            if wrong := differing(row, file.read(row["size"])):
                yield f"{place} has another {', '.join(wrong)} than stated"


def differing(row: Mapping[str, Any], data: bytes) -> list[str]:
    """What a row of an index says of a member that its bytes do not."""
    stated = {**row, "pixels": (row["width"], row["height"])}
    found: dict[str, Any] = {"sample_id": sample_id(row["key"])}
    found |= {"sha256": hashlib.sha256(data).digest(), "xxh3": xxh3_64_intdigest(data)}
    if extension_of(row["extension"]):
        with suppress(OSError, ValueError):  # what does not decode has been named
            found["pixels"] = upright_size(data)
    return [name for name, value in found.items() if stated[name] is not None and stated[name] != value]


def summary(defects: Counter[str]) -> str:
    """Counts of defects by reason."""
    return "\n".join(f"{count:>9,}  {reason}" for reason, count in defects.most_common())


def main(path: Path, layout: str = "text_image", columns: Mapping[str, str | list[str]] | None = None) -> int:
    """Prints every defect and their counts; the exit status is 1 if there is any."""
    if not Path(path).exists():
        raise InputError(f"there is nothing at {path}; expected a tar or a folder of tars")
    defects: Counter[str] = Counter()
    for line in lint(path, layout, columns):
        print(line.translate(SPELT))  # names in a tar are anyone's
        defects[line.split(": ")[2]] += 1
    print(summary(defects) if defects else f"{path}: no defect")
    return 1 if defects else 0
