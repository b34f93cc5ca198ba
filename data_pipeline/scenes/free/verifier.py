"""Pixels of level 3 back to objects: what the colours of a picture suggest, tried by rendering it.

Each colour's pixels vote for shapes, sizes and places; the canvas that these make is refined until its rendering is as
near to the picture as it gets; and only if the two agree everywhere is it what the picture shows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np

from data_pipeline.scenes.free.world import MAX_OBJECTS, Canvas, Placed, mask, overlap, paint
from data_pipeline.scenes.renderer import coverage
from data_pipeline.scenes.verifier import TOLERANCE, smooth
from data_pipeline.scenes.world import BACKGROUNDS, CELL, COLOURS, SHAPES, SIZES

SHOWN = 0.4  # share of a shape's pixels that must have its colour, less than is visible: edges are of no colour
BARE = 0.12  # share of them that may show the background
PLAIN = 30.0  # of 255: how near a pixel of the background comes to its colour
LEAST = 12  # pixels of a colour that are worth an explanation
TRIED = 6  # explanations of one object that are rendered


def read(image: np.ndarray) -> Canvas | None:
    """The canvas that a picture shows, (H, W, 3) uint8 or float in [0, 255]; None where it is not cleanly one."""
    image = image.astype(np.float32)
    height, width = image.shape[:2]
    background = backdrop(image)
    if background is None:
        return None
    labels = classes(image, background)
    bare = votes(np.abs(image - np.array(BACKGROUNDS[background])).max(-1) < PLAIN)
    hypotheses = [found for colour in COLOURS for found in explanations(labels, colour, bare)]
    if len(hypotheses) > MAX_OBJECTS:
        return None
    canvas = Canvas(height, width, tuple(options[0] for options in hypotheses), background)
    canvas = stacked(canvas, image)
    for _ in range(2):
        for options in hypotheses:
            canvas = best_of(canvas, options, image)
    canvas = nudged(canvas, image)
    if difference(canvas, image).max(initial=0.0) > TOLERANCE:
        return None
    return canvas


def backdrop(image: np.ndarray) -> str | None:
    """The background that most pixels have; None if it is less than a quarter of them."""
    near = {name: (np.abs(image - np.array(c)).max(-1) < TOLERANCE / 2).mean() for name, c in BACKGROUNDS.items()}
    best = max(near, key=near.__getitem__)
    return best if near[best] > 0.25 else None


def classes(image: np.ndarray, background: str) -> np.ndarray:
    """Of each pixel the nearest of the colours: 0 for the background, else 1 + the colour's number."""
    palette = np.array([BACKGROUNDS[background], *COLOURS.values()], dtype=np.float32)
    return np.square(image[..., None, :] - palette).sum(-1).argmin(-1)


@cache
def templates() -> list[tuple[str, str, np.ndarray]]:
    """Shape, size and the pixels that it covers by more than half."""
    return [(shape, size, coverage(shape, size) > 0.5) for shape in SHAPES for size in SIZES]


@cache
def spectra(height: int, width: int) -> list[tuple[str, str, int, np.ndarray]]:
    """Shape, size, pixels and the conjugate spectrum of each template, for correlation with a padded picture."""
    side = (height + 2 * CELL, width + 2 * CELL)
    return [(shape, size, int(m.sum()), np.conj(np.fft.rfft2(m, side))) for shape, size, m in templates()]


def votes(pixels: np.ndarray) -> list[np.ndarray]:
    """For each template, how many of its pixels are set, by its place plus CELL: (H + CELL, W + CELL)."""
    height, width = pixels.shape
    padded = np.zeros((height + 2 * CELL, width + 2 * CELL))
    padded[CELL : CELL + height, CELL : CELL + width] = pixels
    spectrum = np.fft.rfft2(padded)
    found = (np.fft.irfft2(spectrum * template, padded.shape) for *_, template in spectra(height, width))
    return [np.rint(f[: height + CELL, : width + CELL]) for f in found]


def explanations(labels: np.ndarray, colour: str, bare: list[np.ndarray]) -> list[list[Placed]]:
    """For each object of a colour some candidates, the likeliest first; `bare` are the background's votes."""
    left = labels == 1 + list(COLOURS).index(colour)
    if left.sum() < LEAST:
        return []
    height, width = labels.shape
    found: list[list[Placed]] = []
    while left.sum() >= LEAST and len(found) <= MAX_OBJECTS:
        options: list[tuple[float, Placed]] = []
        for (shape, size, pixels, _), own, empty in zip(spectra(height, width), votes(left), bare, strict=True):
            ys, xs = np.nonzero((own >= SHOWN * pixels) & (empty <= BARE * pixels))
            scores = own[ys, xs] - 2 * empty[ys, xs]
            for i in np.argsort(-scores)[:TRIED]:
                options.append((scores[i], Placed(int(xs[i]) - CELL, int(ys[i]) - CELL, colour, shape, size)))
        options.sort(key=lambda option: -option[0])
        if not options:
            break  # the edge between two other colours, or nothing known: the comparison at the end decides
        first = options[0][1]
        found.append([o for _, o in options if max(abs(o.x - first.x), abs(o.y - first.y)) < CELL // 3])
        left = left & ~grown(mask(first, height, width) > 0.02)
    return found


def grown(pixels: np.ndarray) -> np.ndarray:
    """The pixels and their neighbours."""
    padded = np.pad(pixels, 1)
    shifts = [padded[dy : dy + pixels.shape[0], dx : dx + pixels.shape[1]] for dy in range(3) for dx in range(3)]
    return np.logical_or.reduce(shifts)


def difference(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """How far the rendering is from the picture, both smoothed, (H, W)."""
    found: np.ndarray = np.abs(smooth(paint(canvas).astype(np.float32)) - smooth(image)).max(-1)
    return found


def error(canvas: Canvas, image: np.ndarray) -> float:
    """One number to make small."""
    return float(np.square(paint(canvas) - image).sum())


def stacked(canvas: Canvas, image: np.ndarray) -> Canvas:
    """The order from back to front that fits best, where objects overlap."""
    touching = any(overlap(a, b) for i, a in enumerate(canvas.objects) for b in canvas.objects[:i])
    if not touching:
        return canvas
    orders = (replace(canvas, objects=order) for order in permutations(canvas.objects))
    return min(orders, key=lambda c: error(c, image))


def best_of(canvas: Canvas, options: list[Placed], image: np.ndarray) -> Canvas:
    """The canvas with the object that is one of the options in the best of their looks and places."""
    current = next((o for o in canvas.objects if o in options), None)
    if current is None:
        return canvas
    return min((canvas.swapped(current, o) for o in options), key=lambda c: error(c, image))


def nudged(canvas: Canvas, image: np.ndarray) -> Canvas:
    """Each object moved by a pixel as long as it helps."""
    least, before = error(canvas, image), None
    while before != canvas:
        before = canvas
        for i in range(len(canvas.objects)):
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                o = canvas.objects[i]
                moved = canvas.swapped(o, replace(o, x=o.x + dx, y=o.y + dy))
                if (value := error(moved, image)) < least:
                    canvas, least = moved, value
    return canvas
