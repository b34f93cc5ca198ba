"""Rows of pictures with their prompts, drawn large enough to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling, new

MIN_CELL = 128  # pixels on the shorter side; smaller pictures are enlarged by a whole factor
GAP = 6
INK, PAPER, BLANK = "black", "white", "#e8e8e8"


@dataclass(frozen=True)
class GridRow:
    """One sample: no, one or several sources, and a prompt."""

    prompt: str
    sources: list[Image]
    target: Image
    output: Image


def draw_grid(blocks: Sequence[Sequence[GridRow]]) -> Image:
    """One block beside the other, each with a row source | target | output and its prompt below per sample."""
    drawn = [_draw_block(rows) for rows in blocks if rows]
    width = sum(block.width for block in drawn) + 3 * GAP * (len(drawn) - 1)
    grid = new("RGB", (width, max(block.height for block in drawn)), PAPER)
    left = 0
    for block in drawn:
        grid.paste(block, (left, 0))
        left += block.width + 3 * GAP
    return grid


def enlarge(image: Image) -> Image:
    """Nearest-neighbour enlargement by the smallest whole factor that makes the shorter side at least MIN_CELL."""
    factor = math.ceil(MIN_CELL / min(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Resampling.NEAREST)


def _draw_block(rows: Sequence[GridRow]) -> Image:
    columns = max(1, *(len(row.sources) for row in rows))
    cells = [_cells(row, columns) for row in rows]
    cell_width = max(cell.width for row in cells for cell in row if cell)
    size = max(14, cell_width // 16)
    font = ImageFont.load_default(size)
    line = math.ceil(size * 1.25)
    width = (columns + 2) * (cell_width + GAP) + GAP
    prompts = [_wrap(row.prompt, font, width - 2 * GAP) for row in rows]
    heights = [max(cell.height for cell in row if cell) for row in cells]
    block = new("RGB", (width, line + sum(heights) + sum(len(p) * line + 2 * GAP for p in prompts)), PAPER)
    draw = ImageDraw.Draw(block)
    for column, label in enumerate(["source"] * columns + ["target", "output"]):
        draw.text((GAP + column * (cell_width + GAP), 0), label, fill=INK, font=font)
    top = line
    for row, height, lines in zip(cells, heights, prompts, strict=True):
        for column, cell in enumerate(row):
            left = GAP + column * (cell_width + GAP)
            if cell:
                block.paste(cell, (left, top))
            else:
                draw.rectangle((left, top, left + cell_width - 1, top + height - 1), fill=BLANK)
        top += height
        for text in lines:
            draw.text((GAP, top), text, fill=INK, font=font)
            top += line
        top += 2 * GAP
    return block


def _cells(row: GridRow, columns: int) -> list[Image | None]:
    sources: list[Image | None] = [enlarge(image) for image in row.sources]
    return [*sources, *[None] * (columns - len(sources)), enlarge(row.target), enlarge(row.output)]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks at spaces so that no line is wider than `width` pixels, words wider than that excepted."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
