"""Which records to train on, decided on the index alone: thresholds, duplicates, decontamination, takedowns, blends.

No shard is touched: the result is keep.parquet, the sample ids that readers honour, and a funnel that says why not the
others. Selecting again replaces it.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import InputError
from data_pipeline.index import DECIDED, KEEP, TEXT_FIELDS, location, sidecars, state_of
from data_pipeline.shards import atomic_write

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio: spreads a key over the upper bits
BLOCK = 1 << 17  # rows compared at a time, in the processor's cache
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}


@dataclass
class Selection:
    """Rules, applied in this order; a record must pass all.

    Args:
        where: conditions on columns, "words >= 3" or "licence != CC-BY-NC-4.0". A null passes: a score that does not
            apply to a kind of record is no reason to drop it.
        takedown: text files of keys or sha256 of members to leave out, one a line.
        decontaminate: text files of sha256 of benchmark pictures, or of 16-digit perceptual hashes, one a line.
        duplicates: "" keeps them, "record" drops equal pictures with equal text, "picture" equal pictures.
        near: largest distance in bits of perceptual hashes to be a duplicate; None keeps near-duplicates.
        share: share of each kind's records that are kept, drawn by sample id ({"edit": 0.5}).
        scorers: the scorer that a column must be from ({"clip_similarity": "openai/clip-vit-large-patch14"}), so that
            a threshold is not applied to another model's scores.
    """

    where: list[str] = field(default_factory=list)
    takedown: list[str] = field(default_factory=list)
    decontaminate: list[str] = field(default_factory=list)
    duplicates: str = ""
    near: int | None = None
    share: dict[str, float] = field(default_factory=dict)
    scorers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for condition in self.where:
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


def select(folder: Path, rules: Selection) -> list[tuple[str, int, int]]:
    """Writes FOLDER/keep.parquet; returns the funnel: (rule, records before, records after)."""
    listed = sidecars(Path(folder))
    columns = needed_columns(listed, rules)
    taken, members = read_lists(rules.takedown)
    forbidden, hashes = read_lists(rules.decontaminate)
    if rules.duplicates or members or hashes:
        check_hashed(listed)
    alike = perceptual(forbidden)
    if len(alike) and "phash" not in columns:
        raise InputError("decontaminate lists perceptual hashes, but not every index has the column phash; build anew")
    table = record_rows(listed, columns)
    funnel: list[tuple[str, int, int]] = []

    def narrow(rule: str, keep: np.ndarray) -> None:
        nonlocal table
        before, table = table.num_rows, table.filter(pa.array(keep))
        funnel.append((rule, before, table.num_rows))

    for condition in rules.where:
        narrow(condition, satisfies(table, condition))
    if rules.takedown:
        narrow("takedown", ~(is_among(table["key"], taken) | holds_member(listed, table, members)))
    if rules.decontaminate:
        keep = ~holds_member(listed, table, hashes)
        if "phash" in table.column_names:
            keep &= ~near_any(table["phash"], alike, rules.near or 0)
        narrow("decontaminate", keep)
    if rules.duplicates:
        names = ["pictures_sha256", *(["text_sha256"] if rules.duplicates == "record" else [])]
        narrow(f"duplicates: {rules.duplicates}", first_of_equal([table[name] for name in names]))
    if rules.near is not None:
        narrow(f"near-duplicates: {rules.near} bits", first_of_near(table["phash"], rules.near))
    if rules.share:
        narrow("share", drawn(table, rules.share))
    buffer = io.BytesIO()
    kept = table.select(["sample_id"]).replace_schema_metadata(
        {"funnel": json.dumps(funnel), DECIDED: state_of(listed)}
    )
    pq.write_table(kept, buffer, compression="zstd")
    atomic_write(Path(folder) / KEEP, buffer.getvalue())
    return funnel


def needed_columns(listed: Sequence[Path], rules: Selection) -> list[str]:
    """The columns to read, checked to be there and to come from the scorers that the rules name."""
    schemas = [pq.read_schema(path) for path in listed]
    wanted = [match[1] for condition in rules.where if (match := CONDITION.fullmatch(condition))]
    wanted += ["phash"] if rules.near is not None else []
    for name in wanted:
        for path, schema in zip(listed, schemas, strict=True):
            if name not in schema.names:
                raise InputError(f"{path} has no column {name}; it has {', '.join(schema.names)}")
    for name, scorer in rules.scorers.items():
        for path, schema in zip(listed, schemas, strict=True):
            found = (schema.field(name).metadata or {}).get(b"scorer", b"").decode() if name in schema.names else "none"
            if found != scorer:
                raise InputError(f"{path}: column {name} is from {found or 'no scorer'}, the rules are for {scorer}")
    wanted += ["key"] if rules.takedown else []
    wanted += ["kind"] if rules.share else []
    wanted += {"record": ["pictures_sha256", "text_sha256"], "picture": ["pictures_sha256"]}.get(rules.duplicates, [])
    wanted += ["phash"] if rules.decontaminate and all("phash" in schema.names for schema in schemas) else []
    return list(dict.fromkeys(["sample_id", *wanted]))


def check_hashed(listed: Sequence[Path]) -> None:
    """Refuses rules that compare pictures where indexes were made from headers alone: they would find nothing."""
    for path in listed:
        if location(path):
            raise InputError(
                f"{path} was made from headers alone, so the sha256 of its pictures is unknown: leave out duplicates "
                "and lists of sha256, or build shards from its tars (data_pipeline.sources.WebDataset)"
            )


def record_rows(listed: Sequence[Path], columns: Sequence[str]) -> pa.Table:
    """One row a record: that of its text, which every record has."""
    parts = (pq.read_table(path, columns=[*columns, "field"]) for path in listed)  # one at a time in memory
    return pa.concat_tables(
        part.filter(pc.is_in(part["field"], pa.array(TEXT_FIELDS))).drop(["field"]) for part in parts
    )


def satisfies(table: pa.Table, condition: str) -> np.ndarray:
    """Which rows satisfy "COLUMN OPERATOR VALUE"; a null does."""
    match = CONDITION.fullmatch(condition)
    assert match is not None
    name, compare, text = match[1], match[2], match[3].strip("'\"")
    column = table[name]
    try:
        value = pa.scalar(text).cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"where: {condition!r} compares {name}, which is {column.type}, with {text!r}") from error
    return pc.fill_null(COMPARE[compare](column, value), True).to_numpy()


def read_lists(paths: Iterable[str]) -> tuple[list[str], list[bytes]]:
    """The lines of text files: all of them as text, and those that are sha256 as bytes."""
    lines: list[str] = []
    for path in paths:
        try:
            lines += [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the list {path}: {error}") from error
    return lines, [bytes.fromhex(line) for line in lines if re.fullmatch(r"[0-9a-fA-F]{64}", line)]


def perceptual(lines: Iterable[str]) -> np.ndarray:
    """The lines that are 16 hexadecimal digits, as unsigned 64-bit integers."""
    return np.array([int(line, 16) for line in lines if re.fullmatch(r"[0-9a-fA-F]{16}", line)], np.uint64)


def is_among(column: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Which rows hold one of the values."""
    return pc.is_in(column, pa.array(values, column.type)).to_numpy()


def holds_member(listed: Sequence[Path], table: pa.Table, hashes: Sequence[bytes]) -> np.ndarray:
    """Which records hold a member with one of these sha256."""
    wanted, found = pa.array(hashes, pa.binary(32)), []
    for path in listed if hashes else []:
        rows = pq.read_table(path, columns=["sample_id", "sha256"])
        found.append(rows.filter(pc.is_in(rows["sha256"], wanted))["sample_id"].to_numpy())
    return np.isin(table["sample_id"].to_numpy(), np.concatenate(found) if found else [])


def first_of_equal(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Which rows are the first with their values; a row with a null is no duplicate."""
    keep = ~repeated([word for column in columns for word in as_words(column)])
    for column in columns:
        keep |= pc.is_null(column).to_numpy()
    return keep


def repeated(words: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows equal an earlier one in all words."""
    mixed = words[0]
    for word in words[1:]:
        mixed = mixed * MULTIPLIER + word
    order = np.argsort(mixed, kind="stable")  # equal rows meet, and stay in stored order
    earlier, later = order[:-1], order[1:]
    same = np.flatnonzero(mixed[earlier] == mixed[later])
    for word in words:
        same = same[word[earlier[same]] == word[later[same]]]
    found = np.zeros(len(mixed), bool)
    found[later[same]] = True
    return found


def as_words(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The first 128 bits of a sha256 column: among ten million records no two differ in the rest alone."""
    filled = pc.fill_null(column, bytes(32)).combine_chunks()
    raw = np.frombuffer(filled.buffers()[1], np.uint64).reshape(-1, 4)[filled.offset : filled.offset + len(filled)]
    return raw[:, 0].copy(), raw[:, 1].copy()


def unsigned(column: pa.ChunkedArray) -> np.ndarray:
    """Perceptual hashes as unsigned integers; nulls are 0, which no fingerprint of a picture is compared with."""
    return pc.fill_null(column, 0).to_numpy().astype(np.int64).view(np.uint64)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which 64-bit integers differ."""
    return np.bitwise_count(a ^ b)


def near_any(column: pa.ChunkedArray, forbidden: np.ndarray, bits: int) -> np.ndarray:
    """Which rows are within `bits` of a forbidden hash."""
    valid = pc.is_valid(column).to_numpy()
    distinct, place = np.unique(np.concatenate([forbidden, unsigned(column)]), return_inverse=True)
    named = np.zeros(len(distinct), bool)
    named[place[: len(forbidden)]] = True
    near = named.copy()
    one, other = near_pairs(distinct, bits)
    near[other[named[one]]] = near[one[named[other]]] = True
    return near[place[len(forbidden) :]] & valid


def first_of_near(column: pa.ChunkedArray, bits: int) -> np.ndarray:
    """Which rows are not within `bits` of an earlier row that is kept; a null is no duplicate."""
    values = unsigned(column)
    valid = np.flatnonzero(pc.is_valid(column).to_numpy())
    first = valid[~repeated([values[valid]])]
    dropped = np.zeros(len(first), bool)
    for earlier, later in zip(*(places.tolist() for places in near_pairs(values[first], bits)), strict=True):
        if not dropped[earlier]:
            dropped[later] = True
    keep = np.ones(len(values), bool)
    keep[valid] = False
    keep[first[~dropped]] = True
    return keep


def near_pairs(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j), i < j, in order, of all pairs of distinct 64-bit values within `bits` of each other.

    Of bits + n bands at least n agree, so every pair meets under the key of some n bands.
    """
    agree = agreeing_bands(len(values), bits)
    edges = np.linspace(0, 64, bits + agree + 1).astype(int)
    bands = [sum(1 << b for b in range(lo, hi)) for lo, hi in pairwise(edges.tolist())]
    keys = [np.uint64(sum(chosen)) for chosen in combinations(bands, agree)] if bits else []
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # NumPy sorts outside the interpreter's lock
        found = list(pool.map(lambda key: pairs_under(key, values, bits), keys))
    pairs = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(2**32 - 1)).astype(np.int64)


def pairs_under(key: np.uint64, values: np.ndarray, bits: int) -> np.ndarray:
    """Near pairs that agree in the bits of `key`, each as i << 32 | j: neighbours, once rows are sorted by it.

    A row is a hash of the key above the place, so that few meet that are not near, and the cost stays linear.
    """
    low = np.uint64((1 << len(values).bit_length()) - 1)
    rows = values & key
    rows *= MULTIPLIER
    rows &= ~low
    rows |= np.arange(len(rows), dtype=np.uint64)
    rows.sort()
    found = [np.empty(0, np.uint64)]
    for start in range(0, len(rows), BLOCK):
        for i, j in sharing_keys(rows, start, low):
            close = distance(values[i], values[j]) <= bits
            found.append(i[close] << np.uint64(32) | j[close])
    return np.concatenate(found)


def sharing_keys(rows: np.ndarray, start: int, low: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (i, j), i < j, of a block's sorted rows and of those behind that share their key, by distance in rows."""
    step, alive = 1, np.arange(start, min(start + BLOCK, len(rows)))
    while alive.size:
        alive = alive[: np.searchsorted(alive, len(rows) - step)]
        alive = alive[(rows[alive] ^ rows[alive + step]) <= low]
        yield rows[alive] & low, rows[alive + step] & low
        step += 1


def agreeing_bands(count: int, bits: int) -> int:
    """How many of the bands a key takes: more make more keys to sort by, fewer let more strangers meet under each."""
    return min(range(1, 7), key=lambda n: comb(bits + n, n) * (1 + count / 2 ** (64 * n / (bits + n) + 1)))


def drawn(table: pa.Table, share: dict[str, float]) -> np.ndarray:
    """Which rows a draw by sample id keeps: the same ones in whatever order or company they are stored."""
    position = table["sample_id"].to_numpy() / 2.0**63
    limit = np.ones(table.num_rows)
    for kind, wanted in share.items():
        limit[pc.equal(table["kind"], kind).to_numpy()] = wanted
    return position < limit


def report(funnel: Sequence[tuple[str, int, int]]) -> str:
    """The funnel in words."""
    return "\n".join(f"{before:>12,} -> {after:>12,}  {rule}" for rule, before, after in funnel)
