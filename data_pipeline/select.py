"""Which records to train on, decided on the index alone: thresholds, duplicates, decontamination, takedowns, blends.

No shard is touched: the result is keep.parquet, the sample ids that readers honour, and a funnel that says why not the
others. Selecting again replaces it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline import parquet
from data_pipeline.duplicates import any_near, first_of_equal, first_of_near
from data_pipeline.errors import InputError
from data_pipeline.index import DECIDED, KEEP, TEXT_FIELDS, location, sidecars, state_of
from data_pipeline.progress import progress
from data_pipeline.records import KINDS
from data_pipeline.shards import atomic_write

HASH = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64}|[0-9a-fA-F]{16})(?:\s+\*?\S.*)?")
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
PERCEPTUAL = ("phash", "phash_others")  # of the picture to learn, and of the others
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}

Listed = Mapping[int, Sequence[Path]]  # the sidecars of each folder, by its number


@dataclass
class Selection:
    """Rules, applied in this order; a record must pass all.

    Args:
        takedown: text files of keys or sha256 of members to leave out, one a line, also as sha256sum writes them.
        where: conditions on columns, "words >= 3" or "licence != CC-BY-NC-4.0". A null passes: a score that does not
            apply to a kind of record is no reason to drop it.
        decontaminate: text files of sha256 of benchmark pictures, or of 16-digit perceptual hashes, one a line, also as
            sha256sum writes them. Every picture of a record is compared, sources too.
        duplicates: "" keeps them, "record" drops equal pictures with equal text, "picture" equal pictures.
        near: largest distance in bits of perceptual hashes to be a duplicate; None keeps near-duplicates.
        share: share of records that are kept, drawn by sample id, of a kind or of those that satisfy a condition
            ({"edit": 0.5, "origin == web": 0.2}); the smallest where several name a record. A null satisfies none.
        scorers: the scorer that a column must be from ({"clip_similarity": "openai/clip-vit-large-patch14"}), so that
            a threshold is not applied to another model's scores.
    """

    takedown: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    decontaminate: list[str] = field(default_factory=list)
    duplicates: str = ""
    near: int | None = None
    share: dict[str, float] = field(default_factory=dict)
    scorers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for condition in self.where:  # a share's condition is told from a kind by its operator
            if not CONDITION.fullmatch(condition):
                raise InputError(
                    f"where: {condition!r} is no condition; expected COLUMN OPERATOR VALUE, as 'words >= 3'"
                )
        if self.duplicates not in ("", "record", "picture"):
            raise InputError(f"duplicates is {self.duplicates!r}; expected record or picture, or nothing to keep them")
        if self.near is not None and not 0 <= self.near <= 8:
            raise InputError(f"near is {self.near}; expected 0 to 8 bits of 64")
        if any(not 0 <= share <= 1 for share in self.share.values()):
            raise InputError(f"share is {self.share}; expected shares from 0 to 1")
        if unknown := [name for name in self.share if name not in KINDS and not CONDITION.fullmatch(name)]:
            raise InputError(f"share names {', '.join(unknown)}; expected one of {', '.join(KINDS)}, or a condition")


def select(folders: Path | Sequence[Path], rules: Selection) -> list[tuple[str, int, int]]:
    """Writes keep.parquet into one or several folders, whose records are compared with each other: of duplicates the
    first folder's is kept. Returns the funnel: (rule, records before, records after)."""
    named = [Path(folders)] if isinstance(folders, str | Path) else [Path(folder) for folder in folders]
    if len({folder.resolve() for folder in named}) < len(named):
        raise InputError(f"a folder is named twice among {', '.join(map(str, named))}")
    listed = {number: sidecars(folder) for number, folder in enumerate(named)}
    columns = needed_columns(listed, rules)
    taken = [hash_of(line) or line for _, line in read_lines(rules.takedown)]
    members = binary(taken)
    forbidden = [hash_in(place, line) for place, line in read_lines(rules.decontaminate)]
    hashes = binary(forbidden)
    if rules.duplicates or members or hashes:
        check_hashed(listed)
    alike = perceptual(forbidden)
    if len(alike):
        check_perceptual(listed)
    table = record_rows(listed, columns)
    funnels: list[list[tuple[str, int, int]]] = [[] for _ in named]

    def narrow(rule: str, keep: np.ndarray) -> None:
        nonlocal table
        before, table = per_folder(table, len(named)), table.filter(pa.array(keep))
        for funnel, *counts in zip(funnels, before, per_folder(table, len(named)), strict=True):
            funnel.append((rule, counts[0], counts[1]))

    if rules.takedown:
        holds, met = holds_member(listed, table, members)
        met |= set(pc.unique(table["key"].filter(pc.is_in(table["key"], pa.array(taken, pa.string())))).to_pylist())
        label = f"takedown ({len(met):,} of {len(set(taken)):,} lines name a record or a member)"
        narrow(label, ~(is_among(table["key"], taken) | holds))
    for condition in rules.where:
        narrow(labelled(condition, listed, table), satisfies(table, condition))
    if rules.decontaminate:
        keep = ~holds_member(listed, table, hashes)[0]
        if len(alike):
            keep &= ~any_near(table, alike, rules.near or 0)
        narrow("decontaminate", keep)
    if rules.duplicates:
        names = ["pictures_sha256", *(["text_sha256"] if rules.duplicates == "record" else [])]
        narrow(f"duplicates: {rules.duplicates}", first_of_equal([table[name] for name in names]))
    if rules.near is not None:
        narrow(f"near-duplicates: {rules.near} bits", first_of_near(table["phash"], rules.near))
    if rules.share:
        narrow("share", drawn(table, rules.share))
    for number, (folder, funnel) in enumerate(zip(named, funnels, strict=True)):
        write_kept(folder, table.filter(pc.equal(table["folder"], number)), funnel)
    rows = zip(*funnels, strict=True)  # of each rule, one a folder
    return [(row[0][0], sum(before for _, before, _ in row), sum(after for _, _, after in row)) for row in rows]


def labelled(condition: str, listed: Listed, table: pa.Table) -> str:
    """A condition as the funnel names it, with how many pass for want of a value and the folders that pass whole."""
    match = CONDITION.fullmatch(condition)
    assert match is not None
    lacking = [paths[0].parent for paths in listed.values() if match[1] not in parquet.schema(paths[0]).names]
    nulls = table[match[1]].null_count
    notes = [f"{nulls:,} have no value and pass"] if nulls else []
    notes += [f"no such column in {', '.join(map(str, lacking))}"] if lacking else []
    return condition + (f" ({'; '.join(notes)})" if notes else "")


def per_folder(table: pa.Table, folders: int) -> list[int]:
    """Rows of each folder."""
    return np.bincount(table["folder"].to_numpy(), minlength=folders).tolist()


def write_kept(folder: Path, table: pa.Table, funnel: Sequence[tuple[str, int, int]]) -> None:
    """Writes a folder's keep.parquet."""
    kept = table.select(["sample_id"]).replace_schema_metadata(
        {"funnel": json.dumps(funnel), DECIDED: state_of(sidecars(folder))}
    )
    atomic_write(folder / KEEP, parquet.encoded(kept))


def needed_columns(listed: Listed, rules: Selection) -> list[str]:
    """The columns to read, checked to be there and to come from the scorers that the rules name.

    A column of a condition may be missing from a whole folder, of which every record then passes, but not from all
    folders or from some indexes of one: that would pass records that nobody scored.
    """
    schemas = {number: [parquet.schema(path) for path in paths] for number, paths in listed.items()}
    conditions = [condition for condition in [*rules.where, *rules.share] if CONDITION.fullmatch(condition)]
    wanted = [match[1] for condition in conditions if (match := CONDITION.fullmatch(condition))]
    for name in dict.fromkeys([*wanted, *rules.scorers]):
        having = [n for n, found in schemas.items() if any(name in schema.names for schema in found)]
        for number in having or list(listed):
            for path, schema in zip(listed[number], schemas[number], strict=True):
                check_column(path, schema, name, rules.scorers.get(name))
    if rules.near is not None:
        for number, paths in listed.items():
            for path, schema in zip(paths, schemas[number], strict=True):
                check_column(path, schema, "phash", None)
    wanted += ["phash"] if rules.near is not None else []
    wanted += ["key"] if rules.takedown else []
    wanted += ["kind"] if rules.share else []
    wanted += {"record": ["pictures_sha256", "text_sha256"], "picture": ["pictures_sha256"]}.get(rules.duplicates, [])
    wanted += PERCEPTUAL if rules.decontaminate else []
    return list(dict.fromkeys(["sample_id", *wanted]))


def check_column(path: Path, schema: pa.Schema, name: str, scorer: str | None) -> None:
    """Refuses an index that lacks a column, or has another scorer's."""
    if name not in schema.names:
        raise InputError(f"{path} has no column {name}; it has {', '.join(schema.names)}")
    found = (schema.field(name).metadata or {}).get(b"scorer", b"").decode()
    if scorer is not None and found != scorer:
        raise InputError(f"{path}: column {name} is from {found or 'no scorer'}, the rules are for {scorer}")


def check_perceptual(listed: Listed) -> None:
    """Refuses perceptual hashes where an index has none to compare them with."""
    for path in (path for paths in listed.values() for path in paths):
        if not set(PERCEPTUAL) <= set(parquet.schema(path).names):
            raise InputError(
                f"decontaminate lists perceptual hashes, {path} lacks one of {' and '.join(PERCEPTUAL)}; add them: "
                f"python -m data_pipeline score {path.parent} -c configs/data/text_image.yaml"
            )


def check_hashed(listed: Listed) -> None:
    """Refuses rules that compare pictures where indexes were made from headers alone: they would find nothing."""
    for path in (path for paths in listed.values() for path in paths):
        if location(path):
            raise InputError(
                f"{path} was made from headers alone, so the sha256 of its pictures is unknown: leave out duplicates "
                "and lists of sha256, or build shards from its tars (data_pipeline.sources.WebDataset)"
            )


def record_rows(listed: Listed, columns: Sequence[str]) -> pa.Table:
    """One row a record, that of its text, which every record has; `folder` is the number of its folder."""
    paths = [(number, path) for number, paths in listed.items() for path in paths]
    parts = []
    for number, path in progress(paths, len(paths), "indexes"):
        there = set(parquet.schema(path).names)
        part = parquet.read(path, [*(name for name in columns if name in there), "field"])
        part = part.filter(pc.is_in(part["field"], pa.array(TEXT_FIELDS))).drop(["field"])
        parts.append(part.append_column("folder", pa.array(np.full(part.num_rows, number, np.int16))))
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the indexes do not fit together: {error}; build or score them again") from error


def satisfies(table: pa.Table, condition: str, null: bool = True) -> np.ndarray:
    """Which rows satisfy "COLUMN OPERATOR VALUE"; `null` says whether one without a value does."""
    match = CONDITION.fullmatch(condition)
    assert match is not None
    name, compare, text = match[1], match[2], match[3].strip("'\"")
    column = table[name]
    try:
        value = pa.scalar(text).cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"where: {condition!r} compares {name}, which is {column.type}, with {text!r}") from error
    if pa.types.is_floating(column.type) and math.isnan(value.as_py()):
        raise InputError(f"where: {condition!r} compares {name} with no number, which nothing satisfies")
    return pc.fill_null(COMPARE[compare](column, value), null).to_numpy()


def read_lines(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The lines of text files that are not empty, each with its place."""
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the list {path}: {error}") from error
        yield from ((f"{path} line {i}", line.strip()) for i, line in enumerate(lines, 1) if line.strip())


def hash_of(line: str) -> str:
    """The sha256 or perceptual hash that a line states, as sha256sum writes it too; "" where it states none."""
    match = HASH.fullmatch(line)
    return match[1].lower() if match else ""


def hash_in(place: str, line: str) -> str:
    """The hash that a line has to state."""
    found = hash_of(line)
    if not found:
        raise InputError(f"{place}: {line[:80]!r} is no hash; expected 64 hexadecimal digits of sha256, or 16 of phash")
    return found


def binary(hashes: Iterable[str]) -> list[bytes]:
    """Those that are sha256, as bytes."""
    return [bytes.fromhex(text) for text in hashes if re.fullmatch(r"[0-9a-f]{64}", text)]


def perceptual(lines: Iterable[str]) -> np.ndarray:
    """The lines that are 16 hexadecimal digits, as unsigned 64-bit integers."""
    return np.array([int(line, 16) for line in lines if re.fullmatch(r"[0-9a-fA-F]{16}", line)], np.uint64)


def is_among(column: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Which rows hold one of the values."""
    return pc.is_in(column, pa.array(values, column.type)).to_numpy()


def holds_member(listed: Listed, table: pa.Table, hashes: Sequence[bytes]) -> tuple[np.ndarray, set[str]]:
    """Which records hold a member with one of these sha256, and those of them that any member of an index has."""
    wanted, holds, met = pa.array(hashes, pa.binary(32)), np.zeros(table.num_rows, bool), set[str]()
    ids, folder = table["sample_id"].to_numpy(), table["folder"].to_numpy()
    for number, paths in listed.items() if hashes else ():
        found = []
        for path in progress(paths, len(paths), "indexes"):
            rows = parquet.read(path, ["sample_id", "sha256"])
            rows = rows.filter(pc.is_in(rows["sha256"], wanted))
            found.append(rows["sample_id"].to_numpy())
            met |= {sha256.hex() for sha256 in rows["sha256"].unique().to_pylist()}
        holds |= (folder == number) & np.isin(ids, np.concatenate(found))
    return holds, met


def drawn(table: pa.Table, share: dict[str, float]) -> np.ndarray:
    """Which rows a draw by sample id keeps: the same ones in whatever order or company they are stored."""
    position = table["sample_id"].to_numpy() / 2.0**63
    limit = np.ones(table.num_rows)
    for name, wanted in share.items():
        rows = satisfies(table, name if CONDITION.fullmatch(name) else f"kind == {name}", null=False)
        limit[rows] = np.minimum(limit[rows], wanted)
    return position < limit


def report(funnel: Sequence[tuple[str, int, int]]) -> str:
    """The funnel in words; where nothing is left, the rule that took the last."""
    lines = [f"{before:>12,} -> {after:>12,}  {rule}" for rule, before, after in funnel]
    if last := next((rule for rule, before, after in funnel if before and not after), None):
        lines.append(f"nothing is kept: {last!r} took the last; look at the histograms of inspect and loosen the rules")
    return "\n".join(lines)
