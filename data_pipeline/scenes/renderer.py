"""Scenes to pixels: antialiased by the signed distance to each shape's outline."""

from __future__ import annotations

from functools import cache

import numpy as np

from data_pipeline.scenes.world import BACKGROUNDS, CELL, COLOURS, LEVELS, SIZES, Scene


@cache
def coverage(shape: str, size: str) -> np.ndarray:
    """Share of each pixel of a cell that a shape covers, (32, 32) in [0, 1]."""
    axis = np.arange(CELL, dtype=np.float64) - (CELL - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    r = SIZES[size]
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(ax, ay) - 0.85 * r
    elif shape == "triangle":
        # apex (0, -r), base y = 0.9 r of half width r; the slanted sides' unit normal is (1.9, -1) / |.|
        slant = (1.9 * ax - (y + r)) / np.hypot(1.9, 1.0)
        distance = np.maximum(slant, y - 0.9 * r)
    else:  # a cross of two bars
        arm = 0.34 * r
        distance = np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
    return np.clip(0.5 - distance, 0.0, 1.0)


def cell_pixels(colour: str, shape: str, size: str, background: str) -> np.ndarray:
    """One object on its background, (32, 32, 3) in [0, 255], not rounded."""
    alpha = coverage(shape, size)[..., None]
    return (1 - alpha) * np.array(BACKGROUNDS[background]) + alpha * np.array(COLOURS[colour])


def render(scene: Scene) -> np.ndarray:
    """A scene as a picture, (H, W, 3) uint8."""
    world = LEVELS[scene.level]
    canvas = np.empty((world.resolution, world.resolution, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        row, column = divmod(o.cell, world.grid)
        window = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        canvas[window] = cell_pixels(o.colour, o.shape, o.size, scene.background)
    return np.rint(canvas).astype(np.uint8)
