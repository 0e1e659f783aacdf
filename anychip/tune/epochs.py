"""The order in which dialogs are read, and the rows they make: exact epochs, as pure functions of (seed, step)."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

_BATCHES_SORTED_TOGETHER = 32
_BATCHES_PACKED_TOGETHER = 16

Indices = npt.NDArray[np.int64]


class Rows(Protocol):
    """Which dialogs stand in which row."""

    def rows(self, step: int) -> list[Indices]:
        """The rows of this step (from 0), each with the numbers of its dialogs."""


class Epochs:
    """An endless reading order over several sources.

    In an epoch a source of weight w is read w times: 1 reads each dialog exactly once; 0.5 reads half of them, and the
    other half in the next epoch; 2.5 reads each twice and half of them once more. Within an epoch the order is random,
    but goes in rounds: the first reads one dialog of every subject, the second another one, so that a short tuning
    meets as many subjects as it can.
    """

    def __init__(
        self, subjects: Indices, seed: int, sources: Indices | None = None, weights: Sequence[float] = (1.0,)
    ) -> None:
        """`subjects` [n], equal numbers for dialogs about the same thing; `sources` [n] index `weights`."""
        if len(subjects) == 0:
            raise ValueError("an epoch needs dialogs")
        self._subjects, self._seed = np.asarray(subjects), seed
        sources = np.zeros(len(subjects), dtype=np.int64) if sources is None else np.asarray(sources)
        self._members = [np.flatnonzero(sources == number) for number in range(len(weights))]
        self._quotas = [Fraction(weight) * len(members) for weight, members in zip(weights, self._members, strict=True)]

    def start(self, epoch: int) -> int:
        """Dialogs read before this epoch."""
        return sum(int(epoch * quota) for quota in self._quotas)

    def find(self, position: int) -> int:
        """The epoch in which the dialog of this position (from 0) is read."""
        epoch = int(position / sum(self._quotas))
        while self.start(epoch + 1) <= position:
            epoch += 1
        while self.start(epoch) > position:
            epoch -= 1
        return epoch

    def epoch(self, epoch: int) -> Indices:
        """The dialogs of this epoch, in order."""
        chosen = np.sort(np.concatenate([self._choose(source, epoch) for source in range(len(self._members))]))
        return self._in_rounds(chosen[generator(self._seed, epoch).permutation(len(chosen))])

    def _choose(self, source: int, epoch: int) -> Indices:
        """What one source gives to an epoch: the next piece of its own permutations."""
        members, quota = self._members[source], self._quotas[source]
        first, end = int(epoch * quota), int((epoch + 1) * quota)
        chosen = []
        while first < end:
            turn, offset = divmod(first, len(members))
            taken = min(end - first, len(members) - offset)
            whole = taken == len(members)
            order = members if whole else members[generator(self._seed, turn, source).permutation(len(members))]
            chosen.append(order[offset : offset + taken])
            first += taken
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)

    def _in_rounds(self, order: Indices) -> Indices:
        """`order`, with the first dialog of each subject before the second one of any, and so on."""
        by_subject = np.argsort(self._subjects[order], kind="stable")
        ranked = self._subjects[order][by_subject]
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        sizes = np.diff(np.r_[starts, len(order)])
        rounds = np.empty(len(order), dtype=np.int64)
        rounds[by_subject] = np.arange(len(order)) - np.repeat(starts, sizes)
        return order[np.argsort(rounds, kind="stable")]


class PaddedRows:
    """A dialog a row. Runs of 32 batches are sorted by length, cut into batches and the batches shuffled: a batch needs
    little padding, and its length says nothing about when it comes."""

    def __init__(self, epochs: Epochs, lengths: Indices, batch_size: int, seed: int) -> None:
        """`lengths` [n] in tokens."""
        self._epochs, self._lengths = epochs, np.asarray(lengths)
        self._batch_size, self._seed = batch_size, seed
        self._newest = (-1, np.empty(0, dtype=np.int64))

    def rows(self, step: int) -> list[Indices]:
        row: list[Indices] = []
        for position in range(step * self._batch_size, (step + 1) * self._batch_size):
            epoch = self._epochs.find(position)
            offset = position - self._epochs.start(epoch)
            row.append(self.epoch(epoch)[offset : offset + 1])
        return row

    def epoch(self, epoch: int) -> Indices:
        """The dialogs of this epoch in the order of the rows (the newest one asked for is remembered)."""
        if self._newest[0] != epoch:
            self._newest = (epoch, self._sorted(epoch))
        return self._newest[1]

    def _sorted(self, epoch: int) -> Indices:
        order, rng = self._epochs.epoch(epoch), generator(self._seed, epoch, "batches")
        begun = -self._epochs.start(epoch) % self._batch_size  # rows that complete the batch the epoch before has begun
        whole = (len(order) - begun) // self._batch_size * self._batch_size if begun <= len(order) else 0
        middle = order[begun : begun + whole]
        span = self._batch_size * _BATCHES_SORTED_TOGETHER
        for start in range(0, whole, span):
            part = middle[start : start + span]
            by_length = part[np.argsort(self._lengths[part], kind="stable")].reshape(-1, self._batch_size)
            middle[start : start + span] = rng.permutation(by_length).reshape(-1)
        return order


class PackedRows:
    """As many dialogs a row as its tokens hold, whole ones. The dialogs of about 16 batches are packed together, the
    longest first, each into the fullest row that still takes it; then these rows are shuffled.

    How many rows an epoch makes depends on its order, so those before a step are packed once to find it.
    """

    def __init__(self, epochs: Epochs, lengths: Indices, row_length: int, batch_size: int, seed: int) -> None:
        """`lengths` [n] in tokens, none above `row_length`."""
        if int(np.max(lengths)) > row_length:
            raise ValueError("a dialog is longer than a row")
        self._epochs, self._lengths = epochs, np.asarray(lengths)
        self._row_length, self._batch_size, self._seed = row_length, batch_size, seed
        self._starts = [0]
        self._packed: dict[int, list[Indices]] = {}

    def rows(self, step: int) -> list[Indices]:
        return [self._row(position) for position in range(step * self._batch_size, (step + 1) * self._batch_size)]

    def _row(self, position: int) -> Indices:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return self.epoch(epoch)[position - self._starts[epoch]]

    def epoch(self, epoch: int) -> list[Indices]:
        """The rows of this epoch (the two newest asked for are remembered)."""
        if epoch not in self._packed:
            self._packed = {k: v for k, v in self._packed.items() if k == epoch - 1} | {epoch: self._pack(epoch)}
        return self._packed[epoch]

    def _pack(self, epoch: int) -> list[Indices]:
        order, rng = self._epochs.epoch(epoch), generator(self._seed, epoch, "batches")
        window = np.cumsum(self._lengths[order]) // (self._row_length * self._batch_size * _BATCHES_PACKED_TOGETHER)
        packed: list[Indices] = []
        for part in np.split(order, np.flatnonzero(np.diff(window)) + 1):
            rows = best_fit(part[np.argsort(-self._lengths[part], kind="stable")], self._lengths, self._row_length)
            packed += [np.array(rows[number], dtype=np.int64) for number in rng.permutation(len(rows))]
        return packed


def best_fit(order: Indices, lengths: Indices, row_length: int) -> list[list[int]]:
    """Put each dialog of `order` into the fullest row that still takes it, or into a new one."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), ascending
    for dialog in order.tolist():
        length = int(lengths[dialog])
        found = bisect_left(open_rows, (length, -1))
        if found == len(open_rows):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(found)
        rows[row].append(dialog)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows


def generator(seed: int, *names: object) -> np.random.Generator:
    """Random numbers of their own for the run's seed, this stage and these names."""
    digest = hashlib.blake2b(":".join(map(str, (seed, "sft", *names))).encode(), digest_size=16).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype="<u4").tolist())
