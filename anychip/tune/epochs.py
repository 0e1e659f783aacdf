"""The order in which dialogs are read: exact epochs, dialogs of similar length side by side."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_BATCHES_SORTED_TOGETHER = 32

Indices = npt.NDArray[np.int64]


class EpochOrder:
    """Which dialogs step s reads, as a pure function of (seed, s).

    Position p of the endless reading order belongs to epoch p // n; within an epoch every one of the n dialogs comes
    exactly once, in a new order. An epoch goes in rounds: the first reads one dialog of every subject, the second
    another one, so that a short tuning meets as many subjects as it can. Otherwise the order is random, except that
    runs of 32 batches are sorted by length, cut into batches and the batches shuffled: a batch needs little padding,
    and its length says nothing about when it comes.
    """

    def __init__(self, lengths: Indices, subjects: Indices, batch_size: int, seed: int) -> None:
        """`lengths` [n] in tokens and `subjects` [n], equal numbers for dialogs about the same thing."""
        if len(lengths) == 0 or batch_size < 1:
            raise ValueError("an epoch needs dialogs, a batch needs rows")
        self._lengths, self._subjects = np.asarray(lengths), np.asarray(subjects)
        self._batch_size, self._seed = batch_size, seed
        self._newest = (-1, np.empty(0, dtype=np.int64))

    def rows(self, step: int) -> Indices:
        """Indices [batch_size] of the dialogs of this step, counted from 0."""
        positions = step * self._batch_size + np.arange(self._batch_size)
        epochs, offsets = np.divmod(positions, len(self._lengths))
        rows = np.empty(self._batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.epoch(int(epoch))[offsets[here]]
        return rows

    def epoch(self, epoch: int) -> Indices:
        """The permutation of all dialogs that makes this epoch (the newest one asked for is remembered)."""
        if self._newest[0] != epoch:
            self._newest = (epoch, self._permutation(epoch))
        return self._newest[1]

    def _permutation(self, epoch: int) -> Indices:
        rng = np.random.default_rng(_words(self._seed, epoch))
        order = self._in_rounds(rng.permutation(len(self._lengths)))
        begun = -epoch * len(order) % self._batch_size  # rows that complete the batch the epoch before has begun
        whole = (len(order) - begun) // self._batch_size * self._batch_size if begun <= len(order) else 0
        middle = order[begun : begun + whole]
        span = self._batch_size * _BATCHES_SORTED_TOGETHER
        for start in range(0, whole, span):
            part = middle[start : start + span]
            by_length = part[np.argsort(self._lengths[part], kind="stable")].reshape(-1, self._batch_size)
            middle[start : start + span] = rng.permutation(by_length).reshape(-1)
        return order

    def _in_rounds(self, order: Indices) -> Indices:
        """`order`, with the first dialog of each subject before the second one of any, and so on."""
        by_subject = np.argsort(self._subjects[order], kind="stable")
        ranked = self._subjects[order][by_subject]
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        sizes = np.diff(np.r_[starts, len(order)])
        rounds = np.empty(len(order), dtype=np.int64)
        rounds[by_subject] = np.arange(len(order)) - np.repeat(starts, sizes)
        return order[np.argsort(rounds, kind="stable")]


def _words(seed: int, epoch: int) -> list[int]:
    """Seed material of numpy's generator, from the run's seed, the stage and the epoch."""
    digest = hashlib.blake2b(f"{seed}:sft:{epoch}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u4").tolist()
