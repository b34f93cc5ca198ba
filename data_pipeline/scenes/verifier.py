"""Pixels back to objects, exactly: each cell must look like one rendered object, or like none, all over.

The picture and the rendered candidates are smoothed alike, which forgives noise, slight blur and compression at the
edges; then the largest difference anywhere in the cell decides, which forgives no missing half, hole, double or speck.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from data_pipeline.scenes.renderer import cell_pixels
from data_pipeline.scenes.world import BACKGROUNDS, CELL, COLOURS, LEVELS, SHAPES, Object, Scene

SMOOTHING = 1.3  # pixels, standard deviation of the Gaussian applied to picture and candidates
TOLERANCE = 60.0  # of 255: the largest smoothed difference in a cell that still counts as a match
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Reading:
    """What a picture shows: per cell an Object, None for empty or UNREADABLE, and the background (None if unclear)."""

    level: int
    cells: tuple[Object | str | None, ...]
    background: str | None

    @property
    def scene(self) -> Scene | None:
        """The scene, or None if any part of the picture is not a clean scene."""
        if self.background is None or UNREADABLE in self.cells:
            return None
        return Scene(self.level, tuple(o for o in self.cells if isinstance(o, Object)), self.background)


def smooth(images: np.ndarray) -> np.ndarray:
    """Gaussian smoothing of (..., H, W, 3) with edges repeated."""
    radius = 4
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SMOOTHING) ** 2).astype(np.float32)
    taps /= taps.sum()
    for axis in (-3, -2):
        widths = [(0, 0)] * images.ndim
        widths[axis] = (radius, radius)
        padded = np.pad(images, widths, mode="edge")
        size = images.shape[axis]
        slices = (padded.take(range(i, i + size), axis=axis) for i in range(2 * radius + 1))
        images = sum(tap * part for tap, part in zip(taps, slices, strict=True))
    return images


@cache
def candidates(level: int, background: str) -> tuple[tuple[tuple[str, str, str] | None, ...], np.ndarray]:
    """All that a cell can show, and its smoothed look, (K, 32, 32, 3) float32. The first is the empty cell."""
    names = [(c, s, z) for c in COLOURS for s in SHAPES for z in LEVELS[level].sizes]
    empty = np.broadcast_to(np.array(BACKGROUNDS[background], dtype=np.float32), (CELL, CELL, 3))
    looks = [empty] + [cell_pixels(c, s, z, background).astype(np.float32) for c, s, z in names]
    return (None, *names), smooth(np.stack(looks))


def read(image: np.ndarray, level: int) -> Reading:
    """Reads one picture, (H, W, 3) uint8 or float in [0, 255], of a level's resolution."""
    world = LEVELS[level]
    expected = (world.resolution, world.resolution, 3)
    if image.shape != expected:
        raise ValueError(f"a picture of level {level} has shape {expected}, got {image.shape}; resize or change level")
    image = image.astype(np.float32)
    background = read_background(image, level)
    if background is None:
        return Reading(level, (UNREADABLE,) * world.grid**2, None)
    names, looks = candidates(level, background)
    flat = looks.reshape(len(looks), -1)
    norms = (flat**2).sum(1)
    smoothed = smooth(image)
    cells: list[Object | str | None] = []
    for cell in range(world.grid**2):
        row, column = divmod(cell, world.grid)
        patch = smoothed[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        best = int(np.argmin(norms - 2 * flat @ patch.reshape(-1)))
        if np.abs(patch - looks[best]).max() > TOLERANCE:
            cells.append(UNREADABLE)
        else:
            name = names[best]
            cells.append(None if name is None else Object(cell, *name))
    return Reading(level, tuple(cells), background)


def read_background(image: np.ndarray, level: int) -> str | None:
    """The background nearest to the median colour along the cells' borders, where no object reaches."""
    inside = np.arange(image.shape[0]) % CELL
    border = np.minimum(inside, CELL - 1 - inside) < 3
    colour = np.median(image[border[:, None] | border[None, :]], axis=0)
    distances = {name: float(np.abs(colour - BACKGROUNDS[name]).max()) for name in LEVELS[level].backgrounds}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= TOLERANCE / 2 else None
