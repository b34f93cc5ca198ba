"""Counts of a folder of shards and one self-contained HTML page of thumbnails."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps

from data_pipeline.errors import InputError
from data_pipeline.index import IndexedRecord, load_index, read_member
from data_pipeline.shards import MANIFEST, READABLE, atomic_write, read_manifest

THUMBNAIL = 160  # pixels
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222;background:#fafafa}
h1{font-size:1.4rem} table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .9rem;border-bottom:1px solid #ddd;text-align:left} td:last-child{text-align:right}
details{margin:0 0 1rem} .grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:14px}
figure{margin:0;padding:12px;background:#fff;border:1px solid #e2e2e2;border-radius:10px}
.row{display:flex;gap:8px;align-items:center;flex-wrap:wrap}
img{width:150px;height:150px;object-fit:contain;background:#f0f0f0;border-radius:6px}
figcaption{margin-top:8px} small{color:#777} .arrow{font-size:1.4rem;color:#999}
"""


def counts(records: list[IndexedRecord]) -> Counter[tuple[str, str]]:
    """Records by (kind, split)."""
    return Counter((record.kind, record.split or "unsplit") for record in records)


def inspect(folder: Path, limit: int = 48) -> str:
    """Writes FOLDER/inspect.html and returns the counts as text."""
    folder = Path(folder)
    records = load_index(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    rows = [(f"{kind}, {split}", n) for (kind, split), n in sorted(counts(records).items())]
    rows += [(f"rejected: {reason}", n) for reason, n in manifest.get("rejected", {}).items()]
    rows += [("shards", len({record.shard for record in records})), ("bytes", total_bytes(records))]
    page = folder / "inspect.html"
    examples = [f"{reason}: {line}" for reason, lines in manifest.get("examples", {}).items() for line in lines]
    atomic_write(page, render_page(folder, rows, examples, spread(records, limit)).encode())
    return "\n".join([*(f"{name:32} {n:>12,}" for name, n in rows), f"pictures: {page}"])


def total_bytes(records: list[IndexedRecord]) -> int:
    """Bytes of all members."""
    return sum(member.size for record in records for member in record.members.values())


def spread(records: list[IndexedRecord], limit: int) -> list[IndexedRecord]:
    """At most `limit` records, evenly spread over each kind."""
    kinds = sorted({record.kind for record in records})
    chosen: list[IndexedRecord] = []
    for kind in kinds:
        own = [record for record in records if record.kind == kind]
        share = max(1, limit // len(kinds))
        chosen += own[:: max(1, -(-len(own) // share))]
    return chosen


def render_page(folder: Path, rows: list[tuple[str, int]], examples: list[str], records: list[IndexedRecord]) -> str:
    """The page: a table of counts, examples of what was rejected and a figure a record."""
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{n:,}</td></tr>" for name, n in rows)
    figures = "\n".join(figure(record) for record in records)
    title = html.escape(str(folder))
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in examples)
    lost = f"<details><summary>examples of rejected records</summary><ul>{lines}</ul></details>" if lines else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><table>{table}</table>{lost}<div class="grid">{figures}</div></html>'
    )


def figure(record: IndexedRecord) -> str:
    """One record: its pictures, an arrow before an edit's target, and its text."""
    facts = json.loads(verified(record, "json"))
    pictures = []
    for name in record.members:
        if name == "json":
            continue
        if name == "target":
            pictures.append('<span class="arrow">&rarr;</span>')
        pictures.append(f'<img alt="{html.escape(name)}" src="{thumbnail(verified(record, name))}">')
    member = record.members.get("target") or record.members["image"]
    text = html.escape(facts.get("caption") or facts.get("instruction") or "")
    detail = html.escape(f"{record.key} · {member.width} x {member.height} · {facts['origin']} {record.split}")
    return (
        f'<figure><div class="row">{"".join(pictures)}</div>'
        f"<figcaption>{text}<br><small>{detail}</small></figcaption></figure>"
    )


def verified(record: IndexedRecord, name: str) -> bytes:
    """The bytes of a member, which must be those that were written."""
    data = read_member(record, name)
    if hashlib.sha256(data).hexdigest() != record.members[name].sha256:
        raise InputError(f"{record.shard}: {name} of {record.key} differs from its index; build the shards again")
    return data


def thumbnail(data: bytes) -> str:
    """A picture as a data URL of at most 160 pixels a side, upright as training sees it."""
    with Image.open(io.BytesIO(data), formats=READABLE) as picture:
        picture.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # a large JPEG is decoded at a fraction of its size
        small = ImageOps.exif_transpose(picture).convert("RGBA")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
