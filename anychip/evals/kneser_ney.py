"""Interpolated modified Kneser-Ney in numpy (Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques").

The model is a trie held in sorted arrays: node k of level n is the k-th distinct n-gram, found by the key
`prefix node * vocab_size + last token`. Training and scoring walk all positions of a text at once, level by level, so
the cost is one sort of the text a level and one binary search a token and level.

    p_n(w | h) = max(c(hw) - D(c(hw)), 0) / c(h.) + g(h) * p_{n-1}(w | h'),      p_0(w) = 1 / vocab_size

c is the raw count at the highest order and, below it, the number of distinct tokens seen to the left; D is one of three
discounts a level (for counts 1, 2 and more); g(h) is the discounted mass, so every distribution sums to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.progress import progress

Tokens = npt.NDArray[np.int64]
Nodes = npt.NDArray[np.int32]
_ABSENT = -1
_SMALLEST_DISCOUNT = 0.05  # above 0, so that no token is ever impossible


@dataclass(frozen=True)
class _Level:
    """All distinct n-grams of one length n."""

    keys: npt.NDArray[np.int64]  # [nodes], ascending: prefix node * vocab_size + last token
    share: npt.NDArray[np.float32]  # [nodes]: discounted count over the total of the prefix
    backoff: npt.NDArray[np.float32]  # [nodes of the level below]: g of the n-gram without its last token


class KneserNey:
    """An n-gram model over token ids. Memory: at most about 20 bytes a training token and order."""

    def __init__(self, vocab_size: int, levels: list[_Level]) -> None:
        self.vocab_size, self._levels = vocab_size, levels

    @property
    def order(self) -> int:
        return len(self._levels)

    @classmethod
    def train(cls, rows: npt.NDArray[np.integer], vocab_size: int, order: int = 5) -> KneserNey:
        """Learn from token ids [rows, length], each in [0, vocab_size); no n-gram crosses from one row to the next.

        Raises ValueError for rows shorter than `order` or ids outside the vocabulary.
        """
        tokens = np.asarray(rows)
        if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < order:
            raise ValueError(f"an n-gram model of order {order} needs rows of at least {order} tokens")
        _check_ids(tokens, vocab_size)
        levels: list[_Level] = []
        keys = np.zeros(1, dtype=np.int64)  # level 0 has one node, the empty n-gram, at every place
        nodes: Nodes = np.zeros((tokens.shape[0], tokens.shape[1] + 1), dtype=np.int32)
        prefixes = 1
        with progress(f"{order}-gram model", total=order, unit="orders") as bar:
            for length in range(1, order + 1):
                tails = tokens[:, length - 1 :]
                longer_keys, longer_nodes, occurrences = _distinct(nodes[:, :-1].ravel(), tails.ravel(), vocab_size)
                if length > 1:  # a shorter n-gram counts once for each distinct token seen to its left
                    without_first = nodes[:, 1:].ravel()[occurrences]
                    levels.append(_level(keys, np.bincount(without_first, minlength=len(keys)), vocab_size, prefixes))
                    prefixes = len(keys)
                keys, nodes = longer_keys, longer_nodes.reshape(tails.shape)
                bar.advance()
            levels.append(_level(keys, np.bincount(nodes.ravel(), minlength=len(keys)), vocab_size, prefixes))
        return cls(vocab_size, levels)

    def probabilities(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """p(token | up to order - 1 tokens before it in its row), fp64 [rows, length], for ids [rows, length].

        The first token of a row has no context. Raises ValueError for ids outside the vocabulary.
        """
        tokens = np.asarray(rows, dtype=np.int64)
        _check_ids(tokens, self.vocab_size)
        result = np.full(tokens.shape, 1.0 / self.vocab_size)
        nodes: Nodes = np.zeros(tokens.shape, dtype=np.int32)  # node of the context that ends before each token
        for length, level in enumerate(self._levels, start=1):
            start = length - 1  # the first token of a row with a context of length - 1 tokens
            context, tails = nodes[:, : tokens.shape[1] - start], tokens[:, start:]
            found = _find(level.keys, context, tails, self.vocab_size)
            known = context != _ABSENT
            lower = result[:, start:]
            share = np.where(found != _ABSENT, level.share[found], 0.0)
            result[:, start:] = np.where(known, share + level.backoff[context] * lower, lower)
            nodes = found
        return result


def _check_ids(tokens: npt.NDArray[np.integer], vocab_size: int) -> None:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"there are token ids outside 0..{vocab_size - 1}")


def _distinct(
    prefixes: Nodes, tails: npt.NDArray[np.integer], vocab_size: int
) -> tuple[npt.NDArray[np.int64], Nodes, Tokens]:
    """Sorted distinct keys, the node of each position, and one position at which each node occurs."""
    every = prefixes * np.int64(vocab_size) + tails
    order = np.argsort(every)
    ranked = every[order]
    fresh = np.empty(len(ranked), dtype=bool)
    fresh[0] = True
    np.not_equal(ranked[1:], ranked[:-1], out=fresh[1:])
    nodes = np.empty(len(every), dtype=np.int32)
    nodes[order] = np.cumsum(fresh, dtype=np.int32) - np.int32(1)
    return ranked[fresh], nodes, order[fresh]


def _find(keys: npt.NDArray[np.int64], prefixes: Nodes, tails: Tokens, vocab_size: int) -> Nodes:
    """Node of each (prefix node, token), or -1 where it (or its prefix) was never seen."""
    wanted = prefixes * np.int64(vocab_size) + tails
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    hit = (keys[position] == wanted) & (prefixes != _ABSENT)
    return np.where(hit, position, _ABSENT).astype(np.int32)


def _level(keys: npt.NDArray[np.int64], counts: Tokens, vocab_size: int, prefixes: int) -> _Level:
    """Shares of the n-grams and the mass their discounts leave to the shorter context."""
    discounts = _discounts(counts)
    removed = discounts[np.minimum(counts, 3)]
    parents = keys // vocab_size
    totals = np.bincount(parents, weights=counts, minlength=prefixes)
    freed = np.bincount(parents, weights=removed, minlength=prefixes)
    backoff = np.divide(freed, totals, out=np.ones(prefixes), where=totals > 0)  # an unseen context leaves everything
    kept = (counts - removed).astype(np.float64)
    share = np.divide(kept, totals[parents], out=np.zeros(len(keys)), where=totals[parents] > 0)
    return _Level(keys, share.astype(np.float32), backoff.astype(np.float32))


def _discounts(counts: Tokens) -> npt.NDArray[np.float64]:
    """Discount by count 0, 1, 2, 3 and more, from how many n-grams were counted once, twice, ... (equation 26)."""
    once, twice, thrice, four = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    y = once / (once + 2 * twice) if once else 0.5
    estimate = [0.0]
    for k, (here, above) in enumerate(((once, twice), (twice, thrice), (thrice, four)), start=1):
        estimate.append(max(k - (k + 1) * y * above / here, _SMALLEST_DISCOUNT) if here else y)
    return np.array(estimate)
