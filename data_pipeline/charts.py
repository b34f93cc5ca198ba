"""Histograms, binned by round numbers and drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

BINS = 24
WIDTH, HEIGHT = 320, 172  # of a chart, in its own units
LEFT, RIGHT, TOP, BASE = 40, 310, 26, 146  # of its plot


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers between `edges` (one more than counts, infinite where a bin is open at an end).

    A column of texts or fingerprints has no edges; `distinct` of its values differ. `strange` values are NaN or
    infinite; `summary` is the lowest, the median and the highest of the others.
    """

    name: str
    detail: str
    values: int
    nulls: int
    strange: int = 0
    distinct: int = 0
    edges: Sequence[float] = ()
    counts: Sequence[int] = ()
    kept: Sequence[int] | None = None
    summary: tuple[float, float, float] = (0.0, 0.0, 0.0)


def histogram(name: str, detail: str, values: np.ndarray, kept: np.ndarray | None, nulls: int) -> Histogram:
    """Counts in round bins; what is not finite is counted apart.

    Args:
        values: (N,) numbers without nulls.
        kept: (N,) whether the record of each is selected.
        nulls: how many are missing besides.
    """
    finite = np.isfinite(values)
    strange = len(values) - int(finite.sum())
    if strange:
        values, kept = values[finite], None if kept is None else kept[finite]
    if not values.size:
        return Histogram(name, detail, 0, nulls, strange)
    edges = bin_edges(values)
    counts = np.histogram(values, edges)[0].tolist()
    chosen = None if kept is None else np.histogram(values[kept], edges)[0].tolist()
    summary = (float(values.min()), float(np.median(values)), float(values.max()))
    return Histogram(name, detail, len(values), nulls, strange, 0, edges.tolist(), counts, chosen, summary)


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Edges of about BINS bins: round ones over the middle 98 of a hundred, half-way between integers if one apart.

    Where the rest reaches far beyond, an infinite edge at that end takes it in; otherwise the bins go over everything.
    """
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu" or not np.any(values % 1)
    if not whole and high - low <= 1e-9 * max(abs(low), abs(high)):  # one value but for rounding
        return np.array([low, high]) + (abs(low) or 1.0) * np.array([-0.5, 0.5])
    first, last = (low, high) if whole and high - low < BINS else np.percentile(values, [1, 99]).tolist()
    reach = (last - first) / 2 if last - first > 1e-6 * max(abs(first), abs(last)) else math.inf
    start, stop = (low if low >= first - reach else first), (high if high <= last + reach else last)
    step = round_step((stop - start) / BINS)
    step = max(1, math.ceil(step)) if whole else step
    shift = 0.5 if whole and step == 1 else 0
    edges = np.arange(math.floor(start / step), math.floor(stop / step) + 2) * step - shift
    return np.concatenate([[-np.inf] if low < edges[0] else [], edges, [np.inf] if high >= edges[-1] else []])


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least this; 1 for nothing."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * (1 - 1e-9))


def chart(found: Histogram) -> str:
    """A card with the histogram as SVG, if there is one, and in words what it holds."""
    missing = [f"{n:,} {name}" for n, name in ((found.nulls, "null"), (found.strange, "not finite")) if n]
    note = " &middot; ".join([f"{found.values:,} values", *missing])
    low, median, high = map(number, found.summary)
    drawing, ends = f'<p class="note">different values: {found.distinct:,}</p>', ""
    if found.edges:
        name, ends = escape(found.name), f"<span>{low} to {high}</span>"
        said = f"histogram of {name}: {low} to {high}, median {median}"
        opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-column="{name}" aria-label="{said}">'
        drawing = "".join([opening, *bins(found), *x_axis(found), "</svg>"])
    heading = f"<h3>{escape(found.name)} <small>{escape(found.detail)}</small></h3>"
    return f'<div class="card">{heading}{drawing}<p class="note">{note}{ends}</p></div>'


def bins(found: Histogram) -> Iterator[str]:
    """Lines with numbers at round counts and a bar a bin; what is selected stands before the rest."""
    step, ticks = (RIGHT - LEFT) / len(found.counts), y_ticks(max(found.counts))
    scale = (BASE - TOP) / ticks[-1]
    for tick in ticks:
        y = BASE - tick * scale
        yield f'<path class="rule" d="M{LEFT} {y:.1f}H{RIGHT}"/>{label(LEFT - 6, y + 3.5, short(tick), "end")}'
    for i, count in enumerate(found.counts):
        low, high = (edge if math.isfinite(edge) else None for edge in found.edges[i : i + 2])
        kept = count if found.kept is None else found.kept[i]
        said = f"{bin_name(low, high)}: {count:,}" + ("" if found.kept is None else f", {kept:,} selected")
        bars = [
            block(name, LEFT + i * step, max(1.5, n * scale), step - 1) for name, n in (("all", count), ("", kept)) if n
        ]
        hit = block("hit", LEFT + i * step, BASE - TOP, step)
        bounds = f'data-low="{"" if low is None else low}" data-high="{"" if high is None else high}"'
        yield f'<g class="bin" {bounds}>{"".join(bars)}{hit}<title>{said}</title></g>'


def block(name: str, x: float, height: float, width: float) -> str:
    """A rectangle on the base line."""
    return (
        f'<rect class="{name}" x="{x:.1f}" y="{BASE - height:.1f}" width="{max(1, width):.1f}" height="{height:.1f}"/>'
    )


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    """A text in a chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def bin_name(low: float | None, high: float | None) -> str:
    """What a bin holds, in words."""
    if low is None or high is None:
        return f"below {number(high)}" if high is not None else f"{number(low or 0)} and more"
    one = high - low == 1 and (low + 0.5).is_integer()
    return number(low + 0.5) if one else f"{number(low)} to {number(high)}"


def y_ticks(most: int) -> list[float]:
    """0 and up to three round counts, the last of them at or above the highest bar."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(step for factor in (0.5, 1, 2, 2.5, 5) if 3 * (step := power * factor) >= most)
    step = max(1, math.ceil(step)) if most < 20 else step
    return [step * i for i in range(math.ceil(most / step) + 1)]


def x_axis(found: Histogram) -> list[str]:
    """Numbers at round edges, or below bins of one integer each; signs below open ends; and the median."""
    edges, step = found.edges, (RIGHT - LEFT) / len(found.counts)
    places = [i for i, edge in enumerate(edges) if math.isfinite(edge)]
    if all((edges[i] + 0.5).is_integer() for i in places):
        marks = [(i + 0.5, edges[i] + 0.5) for i in places[:-1]]
    else:
        marks = [(i, edges[i]) for i in places]
    gap = marks[1][1] - marks[0][1] if len(marks) > 1 else 1
    every = next(n for n in (1, 2, 4, 5, 10, 20, 50) if len(marks) <= 6 * n)
    marks = [mark for mark in marks if round(mark[1] / gap) % every == 0 or len(marks) == 1]
    parts = [f'<path class="axis" d="M{LEFT} {BASE}H{RIGHT}"/>']
    parts += [f'<path class="axis" d="M{LEFT + i * step:.1f} {BASE}v4"/>' for i, _ in marks]
    ends = [
        (i + 0.5, sign) for i, sign in ((0, "&lt;"), (len(edges) - 2, "&ge;")) if not math.isfinite(edges[i + (i > 0)])
    ]
    clear = [mark for mark in marks if all(abs(mark[0] - place) * step > 20 for place, _ in ends)]
    named = [*((i, short(value) if abs(value) >= 10_000 else number(value)) for i, value in clear), *ends]
    parts += [label(LEFT + i * step, BASE + 16, text) for i, text in named]
    median = found.summary[1]
    i = max(k for k, edge in enumerate(edges[:-1]) if edge <= median)
    within = (median - edges[i]) / (edges[i + 1] - edges[i]) if {i, i + 1} <= set(places) else 0.5
    x = LEFT + step * (i + within)
    parts.append(f'<path class="median" d="M{x:.1f} {TOP - 12}V{BASE}"/>')
    beside = (x - 5, "end") if x > WIDTH * 0.6 else (x + 5, "start")
    return [*parts, label(beside[0], TOP - 6, f"median {number(median)}", beside[1])]


def number(value: float) -> str:
    """A number for reading: four significant digits, thousands apart."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def short(count: float) -> str:
    """A number for an axis: 950, 1.2k, 34M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"
