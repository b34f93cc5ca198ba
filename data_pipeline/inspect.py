"""Counts of a folder of shards and one self-contained HTML page: survival funnel, histograms and pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data_pipeline.charts import Histogram, chart, histogram
from data_pipeline.errors import InputError
from data_pipeline.index import KEEP, IndexedRecord, read_member, selection, sidecars
from data_pipeline.index_columns import PICTURES, PLAIN, Index, load, read_index
from data_pipeline.manifest import MANIFEST, read_manifest
from data_pipeline.progress import progress
from data_pipeline.records import EncodedImage
from data_pipeline.report import Categories, Figure, Picture, Report, Stage, render
from data_pipeline.shards import atomic_write, upright_size
from data_pipeline.sources.webdataset import MAX_TEXT, TEXTS
from data_pipeline.steps.decode import Decode
from data_pipeline.steps.pixels import pixels

THUMBNAIL = 384  # pixels of the longer side, enough to look at it enlarged
TINY = 128  # pixels up to which a picture is kept exactly
SAMPLE = 256  # records whose metadata is counted, which only the tars hold: shares to within a few percent
EXACT = 2**53  # integers beyond it are fingerprints, not quantities
LIMITS = Decode(min_side=1)


def inspect(folder: Path, limit: int = 48) -> str:
    """Writes FOLDER/inspect.html with the pictures of at most `limit` records, and returns the counts as text."""
    folder = Path(folder)
    report = survey(folder, limit)
    page = folder / "inspect.html"
    atomic_write(page, render(report).encode("utf-8", "replace"))  # half a surrogate pair in a text has no UTF-8
    rows = [(name, count) for name, count, _ in report.categories[0].counts]
    rows += [(f"rejected: {stage.name}: {reason}", count) for stage in report.stages for reason, count, _ in stage.why]
    rows += [] if report.selected is None else [("selected", report.selected)]
    rows += [("shards", report.shards), ("bytes", report.size)]
    width = max(32, *(len(name) for name, _ in rows))
    return "\n".join([*(f"{name:{width}} {n:>12,}" for name, n in rows), f"pictures: {page}"])


def survey(folder: Path, limit: int) -> Report:
    """What the page shows of a folder."""
    if limit < 0:
        raise InputError(f"limit is {limit}; expected 0 or more records on the page")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    index = read_index(sidecars(folder))
    kept, rules = read_selection(folder, index)
    total = index.table.num_rows
    sample, shown = evenly(min(SAMPLE, total), total), spread(index, kept, limit)
    records = load(index, np.union1d(sample, shown))
    figures = [
        figure(records[i], index.table.slice(i, 1).to_pylist()[0], None if kept is None else bool(kept[i]))
        for i in progress(shown.tolist(), len(shown), "pictures")
    ]
    drawn = histograms(index, kept)
    ends = {found.name: (found.summary[0], found.summary[2]) for found in drawn if found.edges}
    names = dict.fromkeys(name for each in figures for name in each.scores if name in ends)
    return Report(
        folder=str(folder),
        records=total,
        selected=None if kept is None else int(kept.sum()),
        rejected=sum(manifest["rejected"].values()) if manifest else None,
        shards=len(index.listed),
        size=index.size,
        stages=stages(manifest),
        rules=rules,
        categories=categories(index, kept) + metadata_categories([facts_of(records[i]) for i in sample.tolist()]),
        charts=[chart(found) for found in drawn],
        figures=figures,
        columns={name: ends[name] for name in names},
    )


def stages(manifest: dict[str, Any]) -> list[Stage]:
    """The survival funnel of a build."""
    found, before = [], manifest.get("seen", 0)
    for name in manifest.get("stages", []):
        lost = {r.removeprefix(f"{name}: "): n for r, n in manifest["rejected"].items() if r.startswith(f"{name}: ")}
        why = [(reason, n, manifest["examples"].get(f"{name}: {reason}", [])) for reason, n in lost.items()]
        after = manifest["passed"].get(name, 0)
        found.append(Stage(name, before, after, sorted(why, key=lambda reason: -reason[1])))
        before = after
    return found


def read_selection(folder: Path, index: Index) -> tuple[np.ndarray | None, list[Stage]]:
    """Which records a selection kept, (R,) bool, and how many each rule left; None where nothing was selected."""
    path = folder / KEEP
    if not path.is_file():
        return None, []
    table = selection(path)
    try:
        funnel = json.loads((table.schema.metadata or {}).get(b"funnel", b"[]"))
        rules = [Stage(str(rule), int(before), int(after)) for rule, before, after in funnel]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged, select again: {error}") from error
    return np.isin(index.table["sample_id"].to_numpy(), table["sample_id"].to_numpy()), rules


def evenly(count: int, total: int) -> np.ndarray:
    """`count` different numbers below `total`, as far apart as can be."""
    return np.arange(count) * total // max(1, count)


def spread(index: Index, kept: np.ndarray | None, limit: int) -> np.ndarray:
    """The numbers of at most `limit` records, evenly spread over each kind and over what was kept and left out."""
    kind = codes(index.table["kind"])[0]
    group = kind if kept is None else 2 * kind + ~kept
    members = [np.flatnonzero(group == value) for value in np.unique(group)]
    chosen = [np.zeros(0, int)]
    for done, own in enumerate(sorted(members, key=len)):  # what a small group leaves goes to the others
        chosen.append(own[evenly(min(len(own), limit // (len(members) - done)), len(own))])
        limit -= len(chosen[-1])
    return np.sort(np.concatenate(chosen))


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A dictionary column as numbers and the names they stand for; a null is as good as ""."""
    encoded = column.combine_chunks()
    names = [*encoded.dictionary.to_pylist(), ""]
    return pc.fill_null(encoded.indices, names.index("")).to_numpy().astype(np.int64), names


def categories(index: Index, kept: np.ndarray | None) -> list[Categories]:
    """Records by kind and split, by origin and by licence."""
    (kind, kinds), (split, splits) = codes(index.table["kind"]), codes(index.table["split"])
    pairs = [f"{k or 'unknown'}, {s or 'unsplit'}" for k in kinds for s in splits]
    found = [Categories("kind and split", counted(kind * len(splits) + split, pairs, kept))]
    for name in ("origin", "licence"):
        code, names = codes(index.table[name])
        found.append(Categories(name, counted(code, [label or "not given" for label in names], kept)))
    return found


def counted(code: np.ndarray, labels: Sequence[str], kept: np.ndarray | None) -> list[tuple[str, int, int | None]]:
    """(label, records, of them kept), the most frequent first."""
    every = np.bincount(code, minlength=len(labels)).tolist()
    chosen = [None] * len(labels) if kept is None else np.bincount(code[kept], minlength=len(labels)).tolist()
    rows = [row for row in zip(labels, every, chosen, strict=True) if row[1]]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def metadata_categories(sample: Sequence[dict[str, Any]]) -> list[Categories]:
    """Values of metadata that repeat, such as tasks; texts and ids, which differ from record to record, do not."""
    fields: dict[str, Counter[str]] = {}
    for facts in sample:
        for name, value in metadata(facts).items():
            if isinstance(value, str | int) and len(str(value)) <= 40:
                fields.setdefault(str(name), Counter())[str(value)] += 1
    detail = f"of {len(sample):,} records that were read"
    return [
        Categories(f"metadata: {name}", [(value, n, None) for value, n in found.most_common()], detail)
        for name, found in sorted(fields.items())
        if 1 < len(found) <= max(2, found.total() // 4)
    ]


def histograms(index: Index, kept: np.ndarray | None) -> list[Histogram]:
    """Lengths of texts, sizes of pictures and every score column."""
    known = index.width > 0
    width, height = index.width[known], index.height[known]
    of_known = None if kept is None else kept[index.owner[known]]
    found = [column_histogram(index, "text_length", "characters of the caption, instruction or prompt", kept)]
    for name, sides in (("width", width), ("height", height), ("width / height", width / np.maximum(height, 1))):
        found.append(histogram(name, "of every picture, upright", sides, of_known, int((~known).sum())))
    return found + [column_histogram(index, name, scorer, kept) for name, scorer in index.scorers.items()]


def column_histogram(index: Index, name: str, detail: str, kept: np.ndarray | None) -> Histogram:
    """The histogram of a column of the index; one without bins for texts and fingerprints."""
    column = index.table[name]
    column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    nulls, present = column.null_count, column.drop_null()
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = present.to_numpy()
        if values.dtype.kind == "f" or not values.size or max(-int(values.min()), int(values.max())) < EXACT:
            return histogram(name, detail, values, None if kept is None else kept[column.is_valid().to_numpy()], nulls)
    flat = pc.list_flatten(present) if pa.types.is_list(column.type) else present
    return Histogram(name, detail, len(flat), nulls, distinct=pc.count_distinct(flat).as_py())


def figure(record: IndexedRecord, row: dict[str, Any], kept: bool | None) -> Figure:
    """What the page shows of a record: its pictures, its text and what is known about it."""
    facts = facts_of(record)
    pictures = [picture(record, name) for name in record.members if extension(record, name) in PICTURES]
    scores = {name: value for name, value in row.items() if name not in (*PLAIN, "sample_id")}
    if pictures and pictures[-1].width:  # the last is the one to learn, in every kind of record that has one
        scores |= {"width": pictures[-1].width, "height": pictures[-1].height}
    about = {**{name: str(row[name] or "") for name in PLAIN}, "shard": Path(record.shard).name}
    return Figure(record.key, record.kind, kept, pictures, texts_of(record, facts), about, scores, metadata(facts))


def facts_of(record: IndexedRecord) -> dict[str, Any]:
    """The record's JSON object; empty where it has none that can be read."""
    if "json" not in record.members or record.members["json"].size > MAX_TEXT:
        return {}
    data = verified(record, "json")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata(facts: dict[str, Any]) -> dict[str, Any]:
    """What a record carries along: its metadata, or of JSON by others all but its text; nested values are left out."""
    found = facts.get("metadata")
    found = found if isinstance(found, dict) else {name: facts[name] for name in facts if name not in TEXTS}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}


def texts_of(record: IndexedRecord, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of each turn; a caption, instruction or prompt is one without a role."""
    turns = facts.get("turns")
    if isinstance(turns, list):
        return [(str(turn[0]), str(turn[1])) for turn in turns if isinstance(turn, list) and len(turn) == 2]
    if "txt" in record.members and record.members["txt"].size <= MAX_TEXT:
        return [("", verified(record, "txt").decode("utf-8-sig", "replace").strip())]
    names = ("caption", "instruction", "prompt", *TEXTS)
    return [("", str(facts[name])) for name in names if facts.get(name)][:1]


def extension(record: IndexedRecord, name: str) -> str:
    """A member's extension in lower case, without a dot."""
    return record.members[name].extension.lower().lstrip(".")


def verified(record: IndexedRecord, name: str) -> bytes:
    """The bytes of a member, which must be those that were written, where the index has their hash."""
    data, member = read_member(record, name), record.members[name]
    if member.hashed and hashlib.sha256(data).hexdigest() != member.sha256:
        raise InputError(f"{record.shard}: {name} of {record.key} differs from its index; build the shards again")
    return data


def picture(record: IndexedRecord, name: str) -> Picture:
    """A picture as a small data URL, upright and on white as training sees it; or why it cannot be shown."""
    found = LIMITS.check(EncodedImage(verified(record, name), extension(record, name)))
    if isinstance(found, tuple):  # in tars by others, whose pictures nobody looked at before
        return Picture(name, "", 0, 0, ": ".join(found))
    small = Image.fromarray(pixels(found))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(small.size) <= TINY, quality=85)
    url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(name, url, *upright_size(found.data))
