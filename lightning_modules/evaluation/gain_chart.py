"""Gains of arms as a chart: a panel for each column, a line for each arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from data_pipeline.charts import label, round_step
from lightning_modules.evaluation.comparison import Figure, Row

LETTER, PANEL, GAP, LINE, TOP, FOOT = 6.4, 220, 44, 26, 44, 28  # widths and heights, in the chart's own units
STYLE = (
    "text{font:12px sans-serif;fill:#222}.small{font-size:10px;fill:#666}.rule{stroke:#ddd}.zero{stroke:#888}"
    ".up{stroke:#0969da;fill:#0969da}.down{stroke:#bc4c00;fill:#bc4c00}.open{stroke:#57606a;fill:#57606a}"
    ".bar{stroke-width:3;fill:none}.seed{fill-opacity:.35;stroke:none}"
)


def draw(rows: Sequence[Row], baseline: str) -> str:
    """SVG: a dot is the mean gain over the baseline, its bar the paired bootstrap's interval, pale dots are seeds.

    Blue intervals are above 0, orange ones below it, whichever is the better.
    """
    shown = [row for row in rows if row.arm != baseline]
    titles = list(rows[0].figures) if rows else []
    names = round(LETTER * max((len(row.arm) for row in shown), default=0)) + GAP
    width, height = names + len(titles) * (PANEL + GAP), TOP + LINE * len(shown) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
    ]
    parts += [label(names - GAP / 2, middle(i) + 4, escape(row.arm), "end") for i, row in enumerate(shown)]
    for number, title in enumerate(titles):
        left = names + number * (PANEL + GAP)
        parts += panel(left, title, f"gain over {baseline}", [row.figures[title] for row in shown])
    return "\n".join([*parts, "</svg>\n"])


def middle(i: int) -> float:
    """Height of the i-th arm's line."""
    return TOP + LINE * (i + 0.5)


def panel(left: float, title: str, note: str, figures: Sequence[Figure]) -> Iterator[str]:
    """One column's gains, all on one scale that holds 0 and every interval."""
    ends = [0.0, *(end for found in figures for end in (*found.gain, *found.gains))]
    step = round_step(max(max(ends) - min(ends), 0.02) / 5)
    first, last = math.floor(min(ends) / step), math.ceil(max(ends) / step)
    last = max(last, first + 1)

    def x(gain: float) -> float:
        return left + (gain / step - first) / (last - first) * PANEL

    bottom = middle(len(figures)) - LINE / 2
    yield label(left + PANEL / 2, 16, escape(title))
    yield f'<text class="small" x="{left + PANEL / 2:.1f}" y="31" text-anchor="middle">{escape(note)}</text>'
    for tick in range(first, last + 1):
        place = x(tick * step)
        yield f'<path class="{"rule" if tick else "zero"}" d="M{place:.1f} {TOP}V{bottom}"/>'
        yield label(place, bottom + 16, f"{tick * step:+.3g}" if tick else "0")
    for i, found in enumerate(figures):
        yield from whisker(found, middle(i), x)


def whisker(found: Figure, y: float, x: Callable[[float], float]) -> Iterator[str]:
    """A dot with its interval, and one for each seed; `x` is where a gain lies."""
    gain = found.gain
    kind = "up" if gain.low > 0 else "down" if gain.high < 0 else "open"
    yield f'<path class="bar {kind}" d="M{x(gain.low):.1f} {y}H{x(gain.high):.1f}"/>'
    yield from (f'<circle class="seed {kind}" cx="{x(seed):.1f}" cy="{y}" r="4"/>' for seed in found.gains)
    said = f"{gain.mean:+.3f}, {gain.low:+.3f} to {gain.high:+.3f}"
    yield f'<circle class="{kind}" cx="{x(gain.mean):.1f}" cy="{y}" r="5"><title>{said}</title></circle>'
