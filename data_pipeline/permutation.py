"""A keyed order of n things, computed place by place: nothing is stored, so that a billion cost no more than ten."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
MIX1, MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # MurmurHash3's 64-bit finaliser
HALF = np.uint64(33)


class KeyedPermutation:
    """A bijection of 0 ... n - 1, the same on every machine and for ever.

    A balanced Feistel network permutes the next power of four; a value that lands at n or above is sent through it
    again until it does not (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").

    >>> sorted(KeyedPermutation(5, b"key")(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, key: bytes) -> None:
        self.n = n
        bits = max(1, -(-max(n - 1, 1).bit_length() // 2))
        self.shift, self.mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        self.keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at each place, int64."""
        values = self._network(places.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.shift, values & self.mask
        for key in self.keys:
            mixed = (right ^ key) * MIX1
            mixed = (mixed ^ (mixed >> HALF)) * MIX2
            left, right = right, left ^ ((mixed >> HALF) & self.mask)
        return (left << self.shift) | right


class HalfwisePermutation:
    """The order of an epoch of n things: each half in a new order, what is in it the same in all epochs, so that the
    last half of one epoch and the first half of the next hold nothing in common.
    """

    def __init__(self, n: int, key: str, epoch: int) -> None:
        self.half = n // 2
        self.halves = KeyedPermutation(n, key.encode())
        self.first = KeyedPermutation(self.half, f"{key}/{epoch}/first".encode())
        self.last = KeyedPermutation(n - self.half, f"{key}/{epoch}/last".encode())

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at each place, int64."""
        within = np.empty_like(places)
        early = places < self.half
        within[early] = self.first(places[early])
        within[~early] = self.half + self.last(places[~early] - self.half)
        return self.halves(within)
