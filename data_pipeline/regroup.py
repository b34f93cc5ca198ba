"""One sidecar index regrouped for training: its records by stream, in an array of fixed width.

Everything here works on columns, so that a billion records cost arithmetic and not a Python object each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline import parquet
from data_pipeline.errors import InputError
from data_pipeline.index import place_of, shard_of
from data_pipeline.plan import Bucket
from data_pipeline.transforms import fit_sizes

SETS = {  # what the records of one folder fall into: kind of the records, and task
    "text_to_image": ("text_image", "text_to_image"),
    "edit": ("edit", "edit"),
    "multi_reference": ("edit", "edit"),
    "multi_turn": ("edit", "edit"),
    "prompt": ("prompt", "text_to_image"),
    "edit_prompt": ("prompt", "edit"),
}
COLUMNS = ["key", "kind", "split", "sample_id", "turn", "field", "extension", "offset", "size", "width", "height"]
COLUMNS += ["sha256", "xxh3"]
NUMBERS = ["sample_id", "offset", "size", "width", "height", "xxh3"]
REFERENCES = 64  # at most, of one record
TEXT = REFERENCES + 1  # the first role behind those of pictures
UNUSED = TEXT + 2
Group = tuple[str, str, Bucket]  # part, set and bucket of records


@dataclass(frozen=True)
class Rule:
    """What decides the stream of a record.

    Attributes:
        image_size: pixels of the longer side.
        multiple: both sides are multiples of it.
        val_fraction: share of records without a split of their own that is held out, chosen by their ids.
        upscale: whether pictures whose longer side is smaller are enlarged.
        prompts: whether prompts, which have no target, are served too.
    """

    image_size: int
    multiple: int
    val_fraction: float = 0.02
    upscale: bool = True
    prompts: bool = False

    @property
    def kinds(self) -> list[str]:
        """The records that are served."""
        return ["text_image", "edit", "prompt"] if self.prompts else ["text_image", "edit"]


@dataclass(frozen=True)
class Part:
    """A sidecar regrouped.

    Attributes:
        rows: the array's file: target, references and text of each record adjacent, records of a group adjacent.
        dtype: its fields.
        groups: number of records by part, set and bucket, in the array's order.
        shard: location of the tar, its size in bytes, and what changes with its content.
        place: a name of this state of the tar.
        digest: a hash of the samples' ids.
    """

    rows: Path
    dtype: np.dtype[np.void]
    groups: dict[Group, int]
    shard: tuple[str, int, str]
    place: str
    digest: str


def regroup(path: Path, rule: Rule, kept: np.ndarray | None, output: Path) -> Part:
    """Writes the records of a sidecar, sorted by stream, to `output`; `kept` are sorted sample ids, None keeps all."""
    table = parquet.read(path, COLUMNS).combine_chunks()
    facts = table.schema.metadata or {}
    shard = shard_of(path, facts)
    record = numbered(table["key"])
    role = roles(table["field"])
    first = np.flatnonzero(np.diff(record, prepend=-1))
    trained = np.isin(strings(table["kind"])[first], rule.kinds)
    if kept is not None:
        trained &= among(table["sample_id"].to_numpy()[first], kept)
    rows = np.flatnonzero((role < UNUSED) & trained[record])
    rows = rows[np.lexsort((role[rows], record[rows]))]
    signatures, places = np.unique(signature(table, rows, record[rows], role[rows], rule), axis=0, return_inverse=True)
    counts = np.bincount(places, minlength=len(signatures))
    names = [signed(row.tolist()) for row in signatures]
    order = sorted(range(len(names)), key=names.__getitem__)  # one order for all shards
    rank = np.argsort(order)[places]
    rows = rows[np.argsort(np.repeat(rank, lengths(record[rows])), kind="stable")]
    chosen = array(table.take(pa.array(rows)), role[rows])
    np.save(output, chosen, allow_pickle=False)
    return Part(
        output,
        chosen.dtype,
        {names[i]: int(counts[i]) for i in order},
        (str(shard), *stamp(shard, facts, ends(table))),
        place_of(facts),
        hashlib.sha256(chosen["sample_id"].tobytes()).hexdigest(),
    )


def among(ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which ids are in a sorted array."""
    if not len(kept):
        return np.zeros(len(ids), bool)
    found: np.ndarray = kept[np.minimum(kept.searchsorted(ids), len(kept) - 1)] == ids
    return found


def array(table: pa.Table, role: np.ndarray) -> np.ndarray:
    """Rows of an index as one array of fixed width, which worker processes map without any library.

    A sha256 or xxh3 that is not known is 0; `shard` is left for the array that holds those of all tars.
    """
    texts = {
        name: np.asarray([value.encode() for value in table[name].to_pylist()], dtype=np.bytes_)
        for name in ("key", "extension")
    }
    fields = [*((name, column.dtype) for name, column in texts.items()), ("role", "u1"), ("shard", "<i4")]
    numbers = [(name, "<u8" if name == "xxh3" else "<i8") for name in NUMBERS]
    rows = np.zeros(table.num_rows, dtype=[*fields, ("sha256", "S32"), *numbers])
    rows["role"] = role
    for name, column in texts.items():
        rows[name] = column
    rows["sha256"] = [digest or b"" for digest in table["sha256"].to_pylist()]
    for name in NUMBERS:
        rows[name] = table[name].fill_null(0).to_numpy()
    return rows


def numbered(keys: pa.ChunkedArray) -> np.ndarray:
    """The number of each row's record: adjacent rows of one key are one."""
    codes = keys.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.cumsum(np.diff(codes, prepend=codes[:1]) != 0)


def strings(column: pa.ChunkedArray) -> np.ndarray:
    """A column of few distinct texts as an array of them."""
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.dictionary.to_pylist(), dtype=np.str_)[encoded.indices.to_numpy()]


def roles(fields: pa.ChunkedArray) -> np.ndarray:
    """What each member is to its record: 0 the target, 1 + i reference i, then its texts, and what is not used."""
    known = {"target": 0, "image": 0, "txt": TEXT, "json": TEXT + 1, **{f"source{i}": 1 + i for i in range(REFERENCES)}}
    encoded = fields.combine_chunks().dictionary_encode()
    if f"source{REFERENCES}" in encoded.dictionary.to_pylist():
        raise InputError(f"the index has a record of more than {REFERENCES} references; build its shards again")
    values = np.asarray([known.get(name, UNUSED) for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    return values[encoded.indices.to_numpy()] if len(values) else np.empty(0, np.int64)


def name_of_role(role: int, target: str) -> str:
    """The field of a member."""
    if role < TEXT:
        return f"source{role - 1}" if role else target
    return "txt" if role == TEXT else "json"


def lengths(record: np.ndarray) -> np.ndarray:
    """Rows of each record."""
    return np.diff(np.flatnonzero(np.diff(record, prepend=-1, append=-1)))


def signature(table: pa.Table, rows: np.ndarray, record: np.ndarray, role: np.ndarray, rule: Rule) -> np.ndarray:
    """Of each record: whether it is held out, the number of its set, then height and width of target and references.

    A prompt's target is made at the size of the first picture to edit, where there is none as a square.
    """
    first = np.flatnonzero(np.diff(record, prepend=-1))
    local = np.cumsum(np.diff(record, prepend=-1) != 0) - 1
    picture = role < TEXT
    kinds = strings(table["kind"].take(pa.array(rows[first])))
    prompt = kinds == "prompt"
    width, height = (table[name].to_numpy()[rows] for name in ("width", "height"))
    sizes = fit_sizes(np.stack([height[picture], width[picture]], 1), rule.image_size, rule.multiple, rule.upscale)
    references = np.bincount(local[picture & (role > 0)], minlength=len(first))
    targets = np.bincount(local[role == 0], minlength=len(first))
    if (targets == prompt).any() or (lengths(record) != targets + references + 1).any():
        raise InputError("the index has a record without its target, a reference or its text; build or index it again")
    shapes = np.zeros((len(first), 1 + references.max(initial=1), 2), dtype=np.int64)
    shapes[local[picture], role[picture]] = sizes
    shapes[prompt, 0] = np.where(references[prompt, None] > 0, shapes[prompt, 1], rule.image_size)
    one = references == 1
    shapes[one, 1:2] = shapes[one, :1]  # one reference takes the target's size, as released
    ids, splits = table["sample_id"].to_numpy()[rows][first], strings(table["split"].take(pa.array(rows[first])))
    held_out = np.where(splits == "", ids % 10_000 < rule.val_fraction * 10_000, splits == "val")
    turns = np.asarray(table["turn"].is_valid())[rows][first]
    edits = np.where(turns, 3, np.where(references > 1, 2, 1))
    sets = np.where(prompt, 4 + (references > 0), np.where(kinds == "edit", edits, 0))
    return np.column_stack([held_out.astype(np.int64), sets, shapes.reshape(len(first), 2 * shapes.shape[1])])


def signed(row: list[int]) -> Group:
    """A signature as part, set and bucket."""
    sizes = tuple((row[i], row[i + 1]) for i in range(2, len(row), 2) if row[i])
    return ("val" if row[0] else "train"), list(SETS)[row[1]], sizes


def ends(table: pa.Table) -> int:
    """Where the last member ends."""
    return int((table["offset"].to_numpy() + table["size"].to_numpy()).max(initial=0))


def stamp(shard: Path | str, facts: Mapping[bytes, bytes], end: int) -> tuple[int, str]:
    """Size and time of change of a local tar, which must be what was indexed; of one behind a URL as they were then."""
    size, changed = (facts.get(name, b"").decode() for name in (b"bytes", b"stamp"))
    if isinstance(shard, str):
        return int(size), changed
    try:
        found = shard.stat()
    except OSError as error:
        raise InputError(f"cannot read {shard}: {error.strerror}; build or index it again") from error
    if found.st_size < end or size not in ("", str(found.st_size)):
        raise InputError(
            f"{shard} has {found.st_size} bytes, its index is of a tar of {size or end}: it was replaced or cut; build "
            "or index it again"
        )
    if changed not in ("", str(found.st_mtime_ns)):
        raise InputError(f"{shard} was changed after it was indexed, so its pictures may be others; index it again")
    return found.st_size, str(found.st_mtime_ns)
