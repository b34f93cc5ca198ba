"""Curves of a run as one picture."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from PIL import ImageDraw, ImageFont
from PIL.Image import Image, new

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 150, 24, 4  # pixels of a panel, around its curve, and panels beside each other
INK, PALE, CURVE, PAPER = "black", "#d0d7de", "#0969da", "white"
STEP = "/step_"  # before the number of a denoising step, in the names of curves that share a panel
Curve = Sequence[float]


def draw_curves(curves: Mapping[str, Curve]) -> Image:
    """A panel for each curve, from its lowest to its highest value; what is not finite is left out of its line.

    Curves of denoising steps are drawn in one panel with their average, each with its number at its end. A curve that
    began later than another of its panel is shorter: all end at the same time, on the right.
    """
    found = panels(curves)
    rows = math.ceil(len(found) / COLUMNS)
    picture = new("RGB", (WIDTH * min(COLUMNS, max(1, len(found))), HEIGHT * max(1, rows)), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (name, lines) in enumerate(found.items()):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
        draw_panel(draw, (left + MARGIN, top + MARGIN, left + WIDTH - MARGIN, top + HEIGHT - MARGIN), name, lines)
    return picture


def panels(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves of each panel, by the number of their denoising step; "" for what is of no step.

    >>> panels({"ratio": [1.0], "ratio/step_2": [1.1], "reward": [0.5]})
    {'ratio': {'': [1.0], '2': [1.1]}, 'reward': {'': [0.5]}}
    """
    found: dict[str, dict[str, Curve]] = {}
    for name, values in curves.items():
        panel, _, step = name.partition(STEP)
        found.setdefault(panel, {})[step] = values
    return found


def draw_panel(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], name: str, lines: Mapping[str, Curve]
) -> None:
    """One panel, `box` being around its curves."""
    font = ImageFont.load_default(12)
    draw.rectangle(box, outline=PALE)
    draw.text((box[0], box[1] - MARGIN + 6), name, fill=INK, font=font)
    finite = [value for values in lines.values() for value in values if math.isfinite(value)]
    if not finite:
        return
    low, high, longest = min(finite), max(finite), max(map(len, lines.values()))
    steps = sorted((step for step in lines if step), key=int)
    for step in (*steps, *(step for step in lines if not step)):  # the average above the steps
        values, colour = lines[step], step_colour(steps.index(step), len(steps)) if step else CURVE
        points = []
        for i, value in enumerate(values, longest - len(values)):
            points.append(place(i / max(1, longest - 1), value, low, high, box))
        for before, after in pairwise(points):
            if before and after:
                draw.line((*before, *after), fill=colour, width=2)
        if step and points and (last := points[-1]):
            draw.text((box[2] + 3, last[1] - 7), step, fill=colour, font=font)
    shown = [value for value in lines.get("", ()) if math.isfinite(value)]
    last_value = f", last {shown[-1]:.4g}" if shown else ""
    draw.text((box[0], box[3] + 4), f"{low:.4g} to {high:.4g}{last_value}", fill=INK, font=font)


def step_colour(number: int, count: int) -> tuple[int, int, int]:
    """From red, the first step, to green, the last."""
    red, green, blue = colorsys.hsv_to_rgb(number / max(1, count - 1) / 3, 0.9, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def place(
    along: float, value: float, low: float, high: float, box: tuple[int, int, int, int]
) -> tuple[float, float] | None:
    """Where a value is drawn, `along` being 0 at the left and 1 at the right of the box."""
    if not math.isfinite(value):
        return None
    up = (value - low) / (high - low) if high > low else 0.5
    return box[0] + along * (box[2] - box[0]), box[3] - up * (box[3] - box[1])
