"""The page of `inspect`: one HTML file that opens from disk, reaches no network and trusts no text that it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.charts import number, short

LISTED = 8  # categories shown; the rest is summed
Columns = Mapping[str, tuple[float, float]]  # numbers to filter and sort by, each with its range


@dataclass(frozen=True)
class Stage:
    """How many records came to a stage and went on, and why not the others: (reason, count, examples)."""

    name: str
    before: int
    after: int
    why: Sequence[tuple[str, int, Sequence[str]]] = ()


@dataclass(frozen=True)
class Categories:
    """(label, records, of them selected or None), the most frequent first."""

    name: str
    counts: Sequence[tuple[str, int, int | None]]
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """A member's name, the picture as a data URL and its true size in pixels; or the problem with it."""

    name: str
    url: str
    width: int
    height: int
    problem: str = ""


@dataclass(frozen=True)
class Figure:
    """A record as it is shown; `texts` are (role, text), `kept` is None where nothing was selected."""

    key: str
    kind: str
    kept: bool | None
    pictures: Sequence[Picture]
    texts: Sequence[tuple[str, str]]
    about: Mapping[str, str]
    scores: Mapping[str, Any]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """All that the page shows; `selected` and `rejected` are None where nothing was selected or built."""

    folder: str
    records: int
    selected: int | None
    rejected: int | None
    shards: int
    size: int
    stages: Sequence[Stage]
    rules: Sequence[Stage]
    categories: Sequence[Categories]
    charts: Sequence[str]
    figures: Sequence[Figure]
    columns: Columns


def render(report: Report) -> str:
    """The page. Its policy allows this very script, pictures inside the page, and nothing from anywhere else."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    colours = '<span class="swatch"></span>selected <span class="swatch all"></span>left out &middot; '
    legend = f"{'' if report.selected is None else colours}click a bar to filter the records below by it"
    title = escape(Path(report.folder).name or report.folder)
    body = [
        header(report, title),
        section("Survival", funnel(report.stages), "what each stage of the build let through"),
        section("Selection", funnel(report.rules), "what each rule of keep.parquet left"),
        section("Composition", cards([category_list(found) for found in report.categories])),
        section("Distributions", cards(report.charts), legend),
        section("Records", records(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(body)}{BOX}\n"
        f'<script type="application/json" id="data">{page_data(report.figures, report.columns)}</script>\n'
        f'<script type="module">{SCRIPT}</script></body></html>\n'
    )


def page_data(figures: Sequence[Figure], columns: Columns) -> str:
    """What the script filters and sorts by, as JSON that cannot end the script element it stands in."""
    rows = [
        [
            f.kind,
            {None: "", True: "selected", False: "left out"}[f.kept],
            [finite(f.scores.get(name)) for name in columns],
        ]
        for f in figures
    ]
    ranges = [[name, number(low), number(high)] for name, (low, high) in columns.items()]
    text = json.dumps({"columns": ranges, "records": rows}, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: Any) -> float | None:
    """A number, everything else as None. A float32 near 0.6 is 0.6, as `select` sees it, and not 0.6000000238."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.7g}") if isinstance(value, float) else value


def share(part: int, whole: int) -> str:
    """A share in percent; never 0 or 100 for what is neither none nor all."""
    percent = 100 * part / max(1, whole)
    return "&lt; 0.1 %" if 0 < percent < 0.1 else "&gt; 99.9 %" if 99.9 < percent < 100 else f"{percent:.3g} %"


def bar(outer: float, inner: float) -> str:
    """A bar within a bar, as shares of its cell."""
    return f'<td class="wide"><span class="bar" style="--outer:{outer:.2%};--inner:{inner:.2%}"></span></td>'


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of the page, if there is anything in it."""
    return (
        f'<section aria-label="{title}"><h2>{title}<small>{note}</small></h2>{content}</section>\n' if content else ""
    )


def cards(contents: Sequence[str]) -> str:
    """Contents side by side, as many as fit."""
    return f'<div class="cards">{"".join(contents)}</div>'


def header(report: Report, title: str) -> str:
    """The folder and its key figures."""
    tiles = [("records", f"{report.records:,}", "")]
    if report.selected is not None:
        tiles.append(("selected", f"{report.selected:,}", share(report.selected, report.records)))
    if report.rejected is not None:
        seen = report.stages[0].before if report.stages else report.rejected + report.records
        tiles.append(("rejected", f"{report.rejected:,}", share(report.rejected, seen)))
    tiles += [("shards", f"{report.shards:,}", ""), ("bytes", short(report.size), f"{report.size:,}")]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>" for name, value, note in tiles)
    return f"<header><div><h1>{title}</h1><p>{escape(report.folder)}</p></div><dl>{shown}</dl></header>\n"


def funnel(stages: Sequence[Stage]) -> str:
    """A table with a bar a stage; reasons for what was lost stand below it, with examples to unfold."""
    rows, none = [], '<td class="n">&ndash;</td>'
    for stage in stages:
        first, lost = max(1, stages[0].before), stage.before - stage.after
        said = f'<td class="n lost">&minus;{lost:,} <small>{share(lost, stage.before)}</small></td>'
        rows.append(
            f'<tr><th scope="row">{escape(stage.name)}</th>{bar(stage.before / first, stage.after / first)}'
            f'<td class="n">{stage.before:,} &rarr; {stage.after:,}</td>{said if lost else none}</tr>'
        )
        for reason, count, examples in stage.why:
            listed = "".join(f"<li>{escape(example)}</li>" for example in examples)
            unfold = f"<details><summary>{count:,} {escape(reason)}</summary><ul>{listed}</ul></details>"
            rows.append(f'<tr class="why"><td></td><td colspan="3">{unfold}</td></tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("stage", "", "in &rarr; out", "lost"))
    table = f'<table class="card funnel"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return table if stages else ""


def category_list(found: Categories) -> str:
    """Counts as bars, the less frequent ones as a sum."""
    shown, rest = list(found.counts[:LISTED]), found.counts[LISTED:]
    if rest:
        left = None if rest[0][2] is None else sum(row[2] or 0 for row in rest)
        shown.append((f"{len(rest):,} others", sum(row[1] for row in rest), left))
    most, whole = max((row[1] for row in shown), default=1), sum(row[1] for row in shown)
    rows = []
    for label, count, kept in shown:
        said = f"{count:,} <small>{share(count, whole)}</small>"
        said = said if kept is None else f"{kept:,} <small>of {count:,}</small>"
        rows.append(
            f'<tr><th scope="row" title="{escape(label)}">{escape(label)}</th>'
            f"{bar(count / most, (count if kept is None else kept) / most)}"
            f'<td class="n">{said}</td></tr>'
        )
    heading = f"<h3>{escape(found.name)} <small>{found.detail}</small></h3>"
    return f'<div class="card">{heading}<table><tbody>{"".join(rows)}</tbody></table></div>'


def records(report: Report) -> str:
    """The controls and a figure a record."""
    columns = report.columns
    kinds = choices(("", "all kinds"), *((kind, kind) for kind in sorted({figure.kind for figure in report.figures})))
    kept = choices(("", "selected or not"), ("selected", "selected"), ("left out", "left out"))
    orders = [
        (f"{name}:{way}", f"{name} {sign}") for name in columns for way, sign in (("desc", "\u2193"), ("asc", "\u2191"))
    ]
    names = choices(*((name, name) for name in columns))
    number_input = '<label>{0} <input id="{1}" type="number" step="any"></label>'
    return (
        '<form id="controls" hidden><input id="text" type="search" placeholder="search texts and keys" '
        f'aria-label="search texts and keys"><select id="kind" aria-label="kind">{kinds}</select>'
        f'<select id="kept" aria-label="selection" {"hidden" if report.selected is None else ""}>{kept}</select>'
        f'<span><select id="column" aria-label="number to filter by">{names}</select>'
        f"{number_input.format('from', 'min')}{number_input.format('to', 'max')}</span>"
        f'<label>sort <select id="sort">{choices(("", "as stored"), *orders)}</select></label>'
        '<span id="chips"></span><output id="count" aria-live="polite"></output></form>'
        f'<p class="note">{len(report.figures):,} of {report.records:,} records, spread over kinds'
        f"{'' if report.selected is None else ', selected and left out'}; <code>--limit</code> shows more</p>"
        f'<div id="grid">{chr(10).join(card(figure, columns) for figure in report.figures)}</div>'
        '<p id="none" class="note" hidden>No record on this page matches.</p>'
    )


def choices(*listed: tuple[str, str]) -> str:
    """Options of a select: (value, label)."""
    return "".join(f'<option value="{escape(value)}">{escape(said)}</option>' for value, said in listed)


def card(figure: Figure, columns: Columns) -> str:
    """One record: its pictures in order, its text, what it is and all its scores."""
    arrow = '<span aria-hidden="true">&rarr;</span>'
    pictures = "".join(arrow * (p.name == "target") + thumbnail(p) for p in figure.pictures)
    badge = {None: "", True: '<em class="kept">selected</em>', False: "<em>left out</em>"}[figure.kept]
    texts = "".join(
        f"<p>{f'<small>{escape(role)}</small>' if role else ''}{escape(said)}</p>" for role, said in figure.texts
    )
    about = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in figure.about.items() if value)
    scores = "".join(score(name, value, columns.get(name)) for name, value in figure.scores.items())
    extra = json.dumps(figure.metadata, ensure_ascii=False, indent=1, default=str)[:4000] if figure.metadata else ""
    more = f"<details><summary>metadata</summary><pre>{escape(extra)}</pre></details>" if extra else ""
    return (
        f'<figure><div class="pictures">{pictures}</div><figcaption><div class="words">{texts}</div>'
        f'<p class="key"><code>{escape(figure.key)}</code>{badge}</p>'
        f'<dl class="about">{about}</dl><dl class="scores">{scores}</dl>{more}</figcaption></figure>'
    )


def thumbnail(picture: Picture) -> str:
    """A picture to click, with its name and true size below; or why there is none."""
    name = escape(picture.name)
    if picture.problem:
        return f'<div class="picture"><p class="lost">{escape(picture.problem[:300])}</p><small>{name}</small></div>'
    tiny = ' class="tiny"' if max(picture.width, picture.height) <= 128 else ""
    return (
        f'<div class="picture {name}"><button type="button" title="enlarge">'
        f'<img alt="{name}" src="{picture.url}"{tiny}>'
        f"</button><small><span>{name}</span> {picture.width:,} &times; {picture.height:,}</small></div>"
    )


def score(name: str, value: Any, scale: tuple[float, float] | None) -> str:
    """A score and, below it, where it lies between the lowest and the highest of all."""
    if finite(value) is not None and scale is not None:
        place = (value - scale[0]) / ((scale[1] - scale[0]) or 1)
        return f'<div style="--at:{place:.1%}"><dt>{escape(name)}</dt><dd>{number(value)}</dd></div>'
    said = " ".join(map(stated, value)) if isinstance(value, list) else stated(value)
    return f"<div><dt>{escape(name)}</dt><dd>{escape(said)}</dd></div>"


def stated(value: Any) -> str:
    """A value that is no quantity; a fingerprint as the lists of `select` have it."""
    return f"{value % 2**64:016x}" if isinstance(value, int) else "null" if value is None else str(value)


STYLE = """
:root{--page:#f5f6f8;--card:#fff;--text:#1d2127;--soft:#5b6472;--line:#e1e4ea;--well:#eceff3;
--main:#2b64d8;--pale:#c3d3f5;--gone:#b3381d;--pink:#e9b9ad;--good:#146c43;color-scheme:light}
@media(prefers-color-scheme:dark){
:root{--page:#121418;--card:#1b1e24;--text:#e6e9ee;--soft:#9aa4b2;--line:#2c313a;--well:#262b33;
--main:#7aa5ff;--pale:#36486d;--gone:#ff9a80;--pink:#8d4b3e;--good:#6bd4a0;color-scheme:dark}}
*{box-sizing:border-box;overflow-wrap:break-word} [hidden]{display:none!important}
:focus-visible{outline:2px solid var(--main);outline-offset:2px}
body{font:14px/1.5 system-ui,sans-serif;max-width:1440px;margin:auto;padding:28px 24px 64px;background:var(--page);
color:var(--text)}
h1{font-size:24px;line-height:1.2;margin:0} h2{font-size:16px;margin:36px 0 12px} h2 small{margin-left:8px}
h3{font-size:13px;margin:0 0 8px} h3 small{display:block} dl,dd{margin:0} code,pre{font-size:12px;margin:4px 0}
small,dt,.note,header p,h3 small{font-size:12px;font-weight:400;color:var(--soft);margin:0}
header,header dl{display:flex;flex-wrap:wrap;gap:14px 32px;justify-content:space-between;align-items:end}
header dl{justify-content:flex-start} header dd{font-size:22px;font-weight:600;line-height:1.25}
.card,#grid>figure,#controls{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;
margin:0;min-width:0;box-shadow:0 1px 3px #1018280f}
.cards,#grid{--least:310px;display:grid;gap:14px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least)),1fr))}
table{width:100%} th{text-align:left;font-weight:500} td,th{padding:5px 14px 5px 0}
td:last-child,th:last-child{padding-right:0} thead th{font-size:12px;font-weight:400;color:var(--soft)}
thead th:nth-child(n+3){text-align:right} .n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.cards th{max-width:0;width:65%;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.funnel th{white-space:nowrap} .lost{color:var(--gone)} .why td{padding-top:0;font-size:13px}
.why ul{margin:2px 0 6px;color:var(--soft)}
summary{cursor:pointer} details{font-size:12px} .why details{font-size:13px}
.wide{width:35%;min-width:46px} .cards table{font-size:13px} .funnel .wide{width:100%} .funnel{--pale:var(--pink)}
.bar{display:block;position:relative;height:12px;border-radius:3px;overflow:hidden;background:var(--well)}
.bar::before,.bar::after{content:"";position:absolute;inset:0 auto 0 0;width:var(--outer);background:var(--pale)}
.bar::after{width:var(--inner);background:var(--main)}
svg{display:block;width:100%;overflow:visible} svg text{font-size:10.5px;fill:var(--soft)} .rule{stroke:var(--line)}
.axis{stroke:var(--soft)} .median{stroke:var(--text);stroke-dasharray:2 3} .cards .note{display:flex;gap:8px;
justify-content:space-between} rect{fill:var(--main)} rect.all{fill:var(--pale)} rect.hit{fill:#0000}
.bin:hover .hit{fill:var(--soft);opacity:.15} .live .bin{cursor:pointer} .bin.out{opacity:.2}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 8px;background:var(--main)}
.swatch.all{background:var(--pale)}
#controls{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px 12px;align-items:center;padding:10px 14px}
#controls label,#controls span{display:flex;flex-wrap:wrap;gap:6px;align-items:center;color:var(--soft)}
#text{width:200px} #min,#max{width:90px} #count{margin-left:auto;font-weight:600} #controls+.note{margin-top:6px}
input,select,button{font:13px system-ui,sans-serif;color:var(--text);background:var(--page);border:1px solid
var(--line);border-radius:6px;padding:5px 8px;min-height:32px;max-width:100%}
button{cursor:pointer} button:hover{border-color:var(--soft)} #chips button{border-radius:16px;background:var(--pale)}
#grid{--least:350px;margin-top:14px} .picture{flex:1 1 120px;min-width:0;text-align:center}
.pictures{display:flex;gap:8px;align-items:center;flex-wrap:wrap}
.picture button{display:block;width:100%;padding:0;border:0;background:var(--well);overflow:hidden;cursor:zoom-in}
.picture img{display:block;width:100%;height:160px;object-fit:contain} img.tiny{image-rendering:pixelated}
.chosen span{color:var(--good)} .rejected span{color:var(--gone)}
.words{margin:10px 0 6px;max-height:170px;overflow:auto;font-size:15px} .words p{margin:0 0 6px;white-space:pre-wrap}
.words small{display:block} .key{margin:0 0 4px;display:flex;flex-wrap:wrap;gap:4px 8px;align-items:center}
em{font-style:normal;font-size:12px;padding:0 8px;border-radius:9px;background:var(--well)}
em.kept{background:var(--pale)}
.about{display:grid;grid-template-columns:auto 1fr;gap:0 8px;font-size:12px} .about dd{min-width:0}
.scores{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:2px 14px;margin:8px 0;font-size:12px;
font-variant-numeric:tabular-nums} .scores dt{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.scores div{position:relative;display:flex;justify-content:space-between;gap:8px;border-bottom:2px solid var(--well)}
.scores div::after{content:"";position:absolute;left:0;bottom:-2px;width:var(--at,0);height:2px;background:var(--main)}
.scores dd,.key code{min-width:0;overflow-wrap:anywhere} pre{white-space:pre-wrap;max-height:200px;overflow:auto}
dialog{border:0;border-radius:12px;padding:20px;width:min(1280px,96vw);background:var(--card);color:var(--text)}
dialog::backdrop{background:#000a} nav{display:flex;gap:8px;justify-content:end;margin-bottom:12px}
dialog .picture{flex:1 1 260px} dialog .picture img{height:min(60vh,640px)} dialog .words{max-height:none}
dialog .scores{grid-template-columns:repeat(auto-fill,minmax(190px,1fr))}
@media(max-width:640px){body{padding:18px 12px} #controls{position:static} #text{width:100%}
.funnel .wide,thead th:nth-child(2),.why td:first-child{display:none} .funnel th{white-space:normal}}
"""

BOX = """<dialog id="box" aria-label="record"><nav><button id="back" type="button" aria-label="previous">&larr;</button>
<button id="next" type="button" aria-label="next">&rarr;</button><button id="close" type="button">close</button></nav>
<div id="shown"></div></dialog>"""

SCRIPT = """
const {columns, records} = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), names = columns.map(column => column[0]);
const figures = [...document.querySelectorAll("#grid > figure")], charts = [...document.querySelectorAll("svg")];
const text = (figure, part) => figure.querySelector(part).textContent.toLowerCase();
const words = figures.map(figure => text(figure, ".words") + " " + text(figure, "code"));
const visible = () => [...$("grid").children].filter(figure => !figure.hidden);
let state;  // it is kept in the address, so that a view can be shared

function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state = {bounds: new Map()};
  for (const name of ["text", "kind", "kept", "sort"]) state[name] = asked.get(name) ?? "";
  for (const side of ["min", "max"]) for (const term of asked.getAll(side)) {
    const at = term.lastIndexOf(":");
    bound(term.slice(0, at), {[side]: term.slice(at + 1)});
  }
  $("column").value = [...state.bounds.keys()][0] ?? names[0];
  show();
}

function bound(name, sides) {
  const found = {...state.bounds.get(name)};
  for (const [side, text] of Object.entries(sides)) {
    if (text !== "" && Number.isFinite(+text)) found[side] = +text; else delete found[side];
  }
  state.bounds.delete(name);
  if (names.includes(name) && Object.keys(found).length) state.bounds.set(name, found);
}

function matches([kind, kept, values], i) {
  return (!state.kind || kind === state.kind) && (!state.kept || kept === state.kept)
    && words[i].includes(state.text.trim().toLowerCase())
    && [...state.bounds].every(([name, {min = -Infinity, max = Infinity}]) => {
      const value = values[names.indexOf(name)];
      return value !== null && value >= min && value <= max;
    });
}

function show() {
  const [by, way] = state.sort.split(/:(?=desc$|asc$)/), column = names.indexOf(by), sign = way === "asc" ? 1 : -1;
  const value = i => records[i][2][column] ?? null, order = figures.map((_, i) => i);
  order.sort((a, b) => (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b)));
  $("grid").append(...order.map(i => figures[i]));
  figures.forEach((figure, i) => { figure.hidden = !matches(records[i], i); });
  $("count").textContent = `${visible().length} of ${figures.length} shown`;
  $("none").hidden = visible().length > 0;
  for (const name of ["text", "kind", "kept", "sort"]) if ($(name).value !== state[name]) $(name).value = state[name];
  $("chips").replaceChildren(...[...state.bounds].map(([name, {min, max}]) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.title = "remove this filter";
    const ends = [min === undefined ? "" : `${min} \\u2264 `, max === undefined ? "" : ` \\u2264 ${max}`];
    chip.textContent = `${ends[0]}${name}${ends[1]} \\u00d7`;
    chip.onclick = () => { state.bounds.delete(name); show(); };
    return chip;
  }));
  for (const chart of charts) {
    const {min = -Infinity, max = Infinity} = state.bounds.get(chart.dataset.column) ?? {};
    for (const bin of chart.querySelectorAll(".bin")) {
      const {low, high} = bin.dataset;
      bin.classList.toggle("out", high !== "" && +high <= min || low !== "" && +low > max);
    }
  }
  showBounds();
  const address = new URLSearchParams();
  for (const name of ["text", "kind", "kept", "sort"]) if (state[name]) address.set(name, state[name]);
  for (const [name, sides] of state.bounds) for (const side in sides) address.append(side, `${name}:${sides[side]}`);
  history.replaceState(null, "", "#" + address.toString().replaceAll("%3A", ":"));
}

function showBounds() {
  const name = $("column").value, sides = state.bounds.get(name) ?? {};
  const [, low, high] = columns[names.indexOf(name)] ?? [];
  for (const [side, hint] of [["min", low], ["max", high]]) {
    $(side).placeholder = hint ?? "";
    if ($(side) !== document.activeElement) $(side).value = sides[side] ?? "";
  }
}

function enlarge(figure) {
  const copy = figure.cloneNode(true);
  copy.querySelectorAll("button").forEach(button => button.replaceWith(...button.childNodes));
  $("shown").replaceChildren(...copy.childNodes);
  const turn = by => { const all = visible(); enlarge(all.at((all.indexOf(figure) + by) % all.length)); };
  $("back").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("box").onkeydown = event => { const by = {ArrowLeft: -1, ArrowRight: 1}[event.key]; if (by) turn(by); };
  if (!$("box").open) $("box").showModal();
}

if (figures.length) {
  $("controls").hidden = false;
  $("controls").onsubmit = event => event.preventDefault();
  for (const name of ["text", "kind", "kept", "sort"]) $(name).oninput = () => { state[name] = $(name).value; show(); };
  for (const side of ["min", "max"]) {
    $(side).oninput = () => { bound($("column").value, {[side]: $(side).value}); show(); };
  }
  $("column").oninput = showBounds;
  $("grid").onclick = ({target}) => { if (target.closest(".picture button")) enlarge(target.closest("figure")); };
  $("box").onclick = event => { if ([$("box"), $("close")].includes(event.target)) $("box").close(); };
  for (const chart of charts) if (names.includes(chart.dataset.column)) {
    chart.classList.add("live");
    chart.onclick = event => {
      const bin = event.target.closest(".bin");
      if (!bin) return;
      $("column").value = chart.dataset.column;
      bound(chart.dataset.column, {min: bin.dataset.low, max: bin.dataset.high});
      show();
    };
  }
  addEventListener("hashchange", read);
  read();
}
"""
