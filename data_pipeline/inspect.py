"""Counts of a folder of shards and one self-contained HTML page of thumbnails."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from data_pipeline.index import IndexedRecord, load_index, read_member
from data_pipeline.shards import MANIFEST, atomic_write

THUMBNAIL = 160  # pixels
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222;background:#fafafa}
h1{font-size:1.4rem} table{border-collapse:collapse;margin:1rem 0} td,th{padding:.25rem .9rem;border-bottom:1px solid #ddd;
text-align:left} .grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:14px}
figure{margin:0;padding:12px;background:#fff;border:1px solid #e2e2e2;border-radius:10px}
.row{display:flex;gap:8px;align-items:center;flex-wrap:wrap} img{width:150px;height:150px;object-fit:contain;background:#f0f0f0;
border-radius:6px;image-rendering:auto} figcaption{margin-top:8px} small{color:#777} .arrow{font-size:1.4rem;color:#999}
"""


def counts(records: list[IndexedRecord]) -> Counter[tuple[str, str]]:
    """Records by (kind, split)."""
    return Counter((record.kind, record.split or "unsplit") for record in records)


def inspect(folder: Path, limit: int = 48) -> str:
    """Writes FOLDER/inspect.html and returns the counts as text."""
    folder = Path(folder)
    records = load_index(folder)
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    rows = [(f"{kind}, {split}", n) for (kind, split), n in sorted(counts(records).items())]
    rows += [(f"rejected: {reason}", n) for reason, n in manifest.get("rejected", {}).items()]
    rows += [("shards", len({record.shard for record in records})), ("bytes", total_bytes(records))]
    page = folder / "inspect.html"
    atomic_write(page, render_page(folder, rows, spread(records, limit)).encode())
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


def render_page(folder: Path, rows: list[tuple[str, int]], records: list[IndexedRecord]) -> str:
    """The page: a table of counts and a figure a record."""
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{n:,}</td></tr>" for name, n in rows)
    figures = "\n".join(figure(record) for record in records)
    title = html.escape(str(folder))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><table>{table}</table><div class="grid">{figures}</div></html>'
    )


def figure(record: IndexedRecord) -> str:
    """One record: its pictures, an arrow before an edit's target, and its text."""
    facts = json.loads(read_member(record, "json"))
    pictures = []
    for name in sorted(name for name in record.members if name != "json"):
        if name == "target":
            pictures.append('<span class="arrow">&rarr;</span>')
        pictures.append(f'<img alt="{html.escape(name)}" src="{thumbnail(read_member(record, name))}">')
    member = record.members.get("target") or record.members["image"]
    text = html.escape(facts.get("caption") or facts.get("instruction") or "")
    detail = html.escape(f"{record.key} · {member.width} x {member.height} · {facts['origin']} {record.split}")
    return (
        f'<figure><div class="row">{"".join(pictures)}</div>'
        f"<figcaption>{text}<br><small>{detail}</small></figcaption></figure>"
    )


def thumbnail(data: bytes) -> str:
    """A picture as a data URL of at most 160 pixels a side."""
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("RGBA")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
