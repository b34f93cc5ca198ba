"""Equal and nearly equal records, found by sorting: hashes of their bytes, and perceptual hashes within some bits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.progress import progress

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio: spreads a key over the upper bits
BLOCK = 1 << 17  # rows compared at a time, in the processor's cache


def first_of_equal(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Which rows are the first with their values; a row with a null is no duplicate."""
    keep = ~repeated([word for column in columns for word in as_words(column)])
    for column in columns:
        keep |= pc.is_null(column).to_numpy()
    return keep


def repeated(words: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows equal an earlier one in all words."""
    mixed = words[0]
    for word in words[1:]:
        mixed = mixed * MULTIPLIER + word
    order = np.argsort(mixed, kind="stable")  # equal rows meet, and stay in stored order
    earlier, later = order[:-1], order[1:]
    same = np.flatnonzero(mixed[earlier] == mixed[later])
    for word in words:
        same = same[word[earlier[same]] == word[later[same]]]
    found = np.zeros(len(mixed), bool)
    found[later[same]] = True
    return found


def as_words(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The first 128 bits of a sha256 column: among ten million records no two differ in the rest alone."""
    filled = pc.fill_null(column, bytes(32)).combine_chunks()
    raw = np.frombuffer(filled.buffers()[1], np.uint64).reshape(-1, 4)[filled.offset : filled.offset + len(filled)]
    return raw[:, 0].copy(), raw[:, 1].copy()


def unsigned(column: pa.ChunkedArray) -> np.ndarray:
    """Perceptual hashes as unsigned integers; nulls are 0, which no fingerprint of a picture is compared with."""
    return pc.fill_null(column, 0).to_numpy().astype(np.int64).view(np.uint64)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which 64-bit integers differ."""
    return np.bitwise_count(a ^ b)


def any_near(table: pa.Table, forbidden: np.ndarray, bits: int) -> np.ndarray:
    """Which records have a picture within `bits` of a forbidden hash."""
    near = near_any(table["phash"], forbidden, bits)
    others = table["phash_others"].combine_chunks()
    flat = pa.chunked_array([pc.list_flatten(others)])
    near[pc.list_parent_indices(others).to_numpy()[near_any(flat, forbidden, bits)]] = True
    return near


def near_any(column: pa.ChunkedArray, forbidden: np.ndarray, bits: int) -> np.ndarray:
    """Which rows are within `bits` of a forbidden hash. Rows are compared with forbidden hashes alone, of which there
    are few, and not with each other."""
    values = unsigned(column)
    near = np.isin(values, forbidden)
    for key in band_keys(2 * len(forbidden), bits):
        listed = forbidden[np.argsort(forbidden & key)]
        for start in range(0, len(values), BLOCK):
            block, hits = values[start : start + BLOCK], near[start : start + BLOCK]
            first, last = (np.searchsorted(listed & key, block & key, side) for side in ("left", "right"))
            rows = np.flatnonzero((first < last) & ~hits)
            while rows.size:  # through the forbidden hashes that share a row's key
                hits[rows] = distance(block[rows], listed[first[rows]]) <= bits
                first[rows] += 1
                rows = rows[(first[rows] < last[rows]) & ~hits[rows]]
    return near & pc.is_valid(column).to_numpy()


def first_of_near(column: pa.ChunkedArray, bits: int) -> np.ndarray:
    """Which rows are not within `bits` of an earlier row that is kept; a null is no duplicate."""
    values = unsigned(column)
    valid = np.flatnonzero(pc.is_valid(column).to_numpy())
    first = valid[~repeated([values[valid]])]
    dropped = np.zeros(len(first), bool)
    for earlier, later in zip(*(places.tolist() for places in near_pairs(values[first], bits)), strict=True):
        if not dropped[earlier]:
            dropped[later] = True
    keep = np.ones(len(values), bool)
    keep[valid] = False
    keep[first[~dropped]] = True
    return keep


def near_pairs(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j), i < j, in order, of all pairs of distinct 64-bit values within `bits` of each other."""
    keys = band_keys(len(values), bits)
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # NumPy sorts outside the interpreter's lock
        calls = pool.map(lambda key: pairs_under(key, values, bits), keys)
        found = list(progress(calls, len(keys), "comparisons"))
    pairs = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(2**32 - 1)).astype(np.int64)


def pairs_under(key: np.uint64, values: np.ndarray, bits: int) -> np.ndarray:
    """Near pairs that agree in the bits of `key`, each as i << 32 | j: neighbours, once rows are sorted by it.

    A row is a hash of the key above the place, so that few meet that are not near, and the cost stays linear.
    """
    low = np.uint64((1 << len(values).bit_length()) - 1)
    rows = values & key
    rows *= MULTIPLIER
    rows &= ~low
    rows |= np.arange(len(rows), dtype=np.uint64)
    rows.sort()
    found = [np.empty(0, np.uint64)]
    for start in range(0, len(rows), BLOCK):
        for i, j in sharing_keys(rows, start, low):
            close = distance(values[i], values[j]) <= bits
            found.append(i[close] << np.uint64(32) | j[close])
    return np.concatenate(found)


def sharing_keys(rows: np.ndarray, start: int, low: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (i, j), i < j, of a block's sorted rows and of those behind that share their key, by distance in rows."""
    step, alive = 1, np.arange(start, min(start + BLOCK, len(rows)))
    while alive.size:
        alive = alive[: np.searchsorted(alive, len(rows) - step)]
        alive = alive[(rows[alive] ^ rows[alive + step]) <= low]
        yield rows[alive] & low, rows[alive + step] & low
        step += 1


def band_keys(count: int, bits: int) -> list[np.uint64]:
    """Masks under one of which any two 64-bit values within `bits` of each other agree.

    Of bits + n bands at least n agree, so every pair meets under the mask of some n bands.
    """
    agree = agreeing_bands(count, bits)
    edges = np.linspace(0, 64, bits + agree + 1).astype(int)
    bands = [sum(1 << b for b in range(lo, hi)) for lo, hi in pairwise(edges.tolist())]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, agree)] if bits else []


def agreeing_bands(count: int, bits: int) -> int:
    """How many of the bands a key takes: more make more keys to sort by, fewer let more strangers meet under each."""
    return min(range(1, 7), key=lambda n: comb(bits + n, n) * (1 + count / 2 ** (64 * n / (bits + n) + 1)))
