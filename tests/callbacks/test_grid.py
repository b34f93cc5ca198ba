import numpy as np
import PIL.Image
import pytest
import torch

from callbacks.grid import GAP, MIN_CELL, GridRow, draw_grid, enlarge
from callbacks.sample_grid import reference_images, to_pil


def solid(color: str, size: int = 64) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (size, size), color)


def colors(image: PIL.Image.Image) -> dict[tuple[int, ...], int]:
    values, counts = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(v): int(n) for v, n in zip(values.tolist(), counts, strict=True)}


@pytest.mark.parametrize(("size", "factor"), [(32, 4), (64, 2), (96, 2), (127, 2), (128, 1), (512, 1)])
def test_enlarging_repeats_pixels_until_128(size: int, factor: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    large = np.asarray(enlarge(PIL.Image.fromarray(pixels)))
    assert np.array_equal(large, pixels.repeat(factor, 0).repeat(factor, 1))


def test_source_target_and_output_stand_in_this_order() -> None:
    grid = np.asarray(draw_grid([[GridRow("make it red", [solid("red")], solid("lime"), solid("blue"))]]))
    middle = grid[20 + MIN_CELL // 2]
    centres = [middle[GAP + i * (MIN_CELL + GAP) + MIN_CELL // 2].tolist() for i in range(3)]
    assert centres == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert all(colors(PIL.Image.fromarray(grid))[tuple(c)] == MIN_CELL**2 for c in centres)


def test_a_missing_source_leaves_a_blank_cell() -> None:
    with_source = GridRow("a", [solid("red")], solid("lime"), solid("blue"))
    without = GridRow("a", [], solid("lime"), solid("blue"))
    assert colors(draw_grid([[with_source]])).get((0xE8, 0xE8, 0xE8), 0) < 100  # the edges of letters
    assert colors(draw_grid([[without]]))[(0xE8, 0xE8, 0xE8)] >= MIN_CELL**2
    assert draw_grid([[without]]).size == draw_grid([[with_source]]).size
    two = GridRow("a", [solid("red"), solid("yellow")], solid("lime"), solid("blue"))
    grid = draw_grid([[two, with_source]])
    assert grid.width == 4 * (MIN_CELL + GAP) + GAP
    assert MIN_CELL**2 <= colors(grid)[(0xE8, 0xE8, 0xE8)] < 1.1 * MIN_CELL**2


def test_long_prompts_wrap_and_every_line_is_drawn() -> None:
    row = GridRow("word " * 60, [], solid("lime"), solid("blue"))
    short = GridRow("word", [], solid("lime"), solid("blue"))
    tall, low = draw_grid([[row]]), draw_grid([[short]])
    assert tall.width == low.width and tall.height > low.height + 60
    ink = (np.asarray(tall.convert("L"))[-40:-14] < 100).sum()
    assert ink > 100  # the last line of text


def test_blocks_stand_side_by_side() -> None:
    rows = [GridRow("a", [], solid("lime"), solid("blue"))]
    one, two = draw_grid([rows]), draw_grid([rows, rows * 2])
    assert two.width == 2 * one.width + 3 * GAP and two.height > one.height


def test_references_of_every_form_become_pictures() -> None:
    stacked = torch.zeros(2, 1, 3, 8, 8)
    listed = [[], [torch.zeros(3, 4, 4), torch.ones(3, 8, 8)]]
    assert reference_images(None, 2) == [[], []]
    assert [[i.size for i in images] for images in reference_images(stacked, 2)] == [[(8, 8)], [(8, 8)]]
    assert [[i.size for i in images] for images in reference_images(listed, 2)] == [[], [(4, 4), (8, 8)]]
    levels = torch.tensor([-1.5, -1.0, 0.0, 1.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(levels))[0, :, 0].tolist() == [0, 0, 128, 255]
