"""Curves of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from PIL import ImageDraw, ImageFont
from PIL.Image import Image, new

WIDTH, HEIGHT, MARGIN, COLUMNS = 300, 150, 24, 4  # pixels of a panel, around its curve, and panels beside each other
INK, PALE, CURVE, PAPER = "black", "#d0d7de", "#0969da", "white"


def draw_curves(curves: Mapping[str, Sequence[float]]) -> Image:
    """A panel for each curve, from its lowest to its highest value; what is not finite is left out of its line."""
    rows = math.ceil(len(curves) / COLUMNS)
    picture = new("RGB", (WIDTH * min(COLUMNS, max(1, len(curves))), HEIGHT * max(1, rows)), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    for number, (name, values) in enumerate(curves.items()):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
        box = left + MARGIN, top + MARGIN, left + WIDTH - MARGIN, top + HEIGHT - MARGIN
        draw.rectangle(box, outline=PALE)
        draw.text((box[0], top + 6), name, fill=INK, font=font)
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        draw.text((box[0], box[3] + 4), f"{low:.4g} to {high:.4g}, last {finite[-1]:.4g}", fill=INK, font=font)
        points = [place(i / max(1, len(values) - 1), value, low, high, box) for i, value in enumerate(values)]
        for before, after in pairwise(points):
            if before and after:
                draw.line((*before, *after), fill=CURVE, width=2)
    return picture


def place(
    along: float, value: float, low: float, high: float, box: tuple[int, int, int, int]
) -> tuple[float, float] | None:
    """Where a value is drawn, `along` being 0 at the left and 1 at the right of the box."""
    if not math.isfinite(value):
        return None
    up = (value - low) / (high - low) if high > low else 0.5
    return box[0] + along * (box[2] - box[0]), box[3] - up * (box[3] - box[1])
