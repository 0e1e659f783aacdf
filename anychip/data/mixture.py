"""Which sample of which corpus stands at which place of training: a pure function, the same on any number of ranks.

Places are counted by one global index g = step * global_batch_size + row. Corpora take turns by weight, and each
corpus walks through its samples epoch by epoch in an order of its own. Everything is computed, nothing is stored:
any place is found in O(1) time and memory, so a run resumes at any step without reading what came before.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from anychip.data.mix64 import mix64

_MAX_PERIOD = 1 << 16
_FEISTEL_ROUNDS = 6

Integers = npt.NDArray[np.int64]


class Permutation:
    """A keyed order of 0..size-1 without a table: a Feistel network on the next even power of two, walked until it
    lands inside (Black and Rogaway 2002, cycle-walking).
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, indices: Integers) -> Integers:
        """Where each index in [0, size) goes; int64, same shape."""
        values = self._scramble(indices.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._scramble(values[outside])
        return values.astype(np.int64)

    def inverse(self, index: int) -> int:
        """The index that goes to `index`."""
        value = np.array([index], np.uint64)
        while True:
            value = self._unscramble(value)
            if value[0] < self.size:
                return int(value[0])

    def _scramble(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right + key) & self._mask)
        return (left << self._half_bits) | right

    def _unscramble(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ (mix64(left + key) & self._mask), left
        return (left << self._half_bits) | right


class Turns:
    """Who is next when several corpora share the places by weight.

    After any number n of places, each corpus has had its exact share of n, up to less than one: the pattern of one
    period is made by Tijdeman's rule (1980, "The chairman assignment problem"): among the corpora that may take one
    more without running ahead, the one whose turn falls due first. Weights whose ratio needs a longer period than
    65,536 are first rounded to that many parts by the largest remainder.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = _parts(weights)
        self.period = sum(parts)
        self._pattern = _pattern(parts)
        self._shares = np.asarray(parts, np.int64)
        self._places = [np.flatnonzero(self._pattern == corpus) for corpus in range(len(parts))]
        self._earlier = np.empty(self.period, np.int64)
        for places in self._places:
            self._earlier[places] = np.arange(len(places))

    def corpus(self, places: Integers) -> Integers:
        """Who has each place."""
        return self._pattern[places % self.period]

    def rank(self, places: Integers) -> Integers:
        """How many places before each one the same corpus has had."""
        inside = places % self.period
        return places // self.period * self._shares[self._pattern[inside]] + self._earlier[inside]

    def count(self, corpus: int, places: int) -> int:
        """How many of the first `places` places the corpus has."""
        whole, inside = divmod(places, self.period)
        return whole * int(self._shares[corpus]) + int(np.searchsorted(self._places[corpus], inside))

    def place(self, corpus: int, rank: int) -> int:
        """The place where the corpus has its turn number `rank`, from 0. The corpus must have a weight."""
        whole, inside = divmod(rank, int(self._shares[corpus]))
        return whole * self.period + int(self._places[corpus][inside])

    def has_turns(self, corpus: int) -> bool:
        return bool(self._shares[corpus] > 0)


def _parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, as small as they can be."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= _MAX_PERIOD:
        return [int(share * period) for share in shares]
    quotas = [share * _MAX_PERIOD for share in shares]
    parts = [max(int(quota), 1) if quota else 0 for quota in quotas]
    while (missing := _MAX_PERIOD - sum(parts)) != 0:
        remainders = [quota - part for quota, part in zip(quotas, parts, strict=True)]
        if missing > 0:
            parts[remainders.index(max(remainders))] += 1
        else:
            parts[remainders.index(min(remainders))] -= 1
    return parts


def _pattern(parts: Sequence[int]) -> Integers:
    """One period of turns. Turn number r of a corpus with p of P places waits until place r * P / p, rounded down,
    and is due before place (r + 1) * P / p, rounded up."""
    period = sum(parts)
    pattern = np.empty(period, np.int64)
    waiting = [(0, corpus, 0) for corpus, part in enumerate(parts) if part]
    heapq.heapify(waiting)
    due: list[tuple[int, int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, corpus, rank = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(rank + 1) * period // parts[corpus]), corpus, rank))
        _, corpus, rank = heapq.heappop(due)
        pattern[place] = corpus
        if rank + 1 < parts[corpus]:
            heapq.heappush(waiting, ((rank + 1) * period // parts[corpus], corpus, rank + 1))
    return pattern
