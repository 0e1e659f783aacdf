"""Where each unit of a grown dimension comes from.

A new unit copies an old one, or is fresh. Copies keep the function when what they feed is split between them (Net2Net,
arXiv 1511.05641); fresh units keep it when one side of them is closed. The rules for RMSNorm and for grouped queries:

- Hidden channels that are all copied equally often leave the mean square as it was. Any other growth pads with fresh,
  closed channels; the old ones are scaled by sqrt(new / old) where they are written, which leaves the mean square over
  all channels as it was over the old ones, eps included, and the gains are divided by the same.
- Query heads stay with a copy of the key/value head that they had: heads are copied inside their group, and groups with
  their heads. A tiling of query heads alone would give them other keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from anychip.errors import InputError

FRESH = -1
_SHORT_RUN = 16


@dataclass(frozen=True)
class Index:
    """Which units to take along a dimension, int64 [n]. Whole runs are taken at once where they are long: that is
    several times as fast as one by one."""

    units: Tensor

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of each run of rising neighbours, in order."""
        ends = (self.units[1:] != self.units[:-1] + 1).nonzero().flatten() + 1
        bounds = [0, *ends.tolist(), len(self.units)]
        return [(int(self.units[a]), b - a) for a, b in pairwise(bounds) if b > a]

    def take(self, x: Tensor, dim: int) -> Tensor:
        """As index_select; a view where the units are one run."""
        if len(self.runs) * _SHORT_RUN > len(self.units):
            return x.index_select(dim, self.units)
        parts = [x.narrow(dim, start, length) for start, length in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def put(self, to: Tensor, values: Tensor) -> None:
        """to[..., units] = values"""
        done = 0
        for start, length in self.runs:
            to.narrow(-1, start, length).copy_(values.narrow(-1, done, length))
            done += length

    def add(self, to: Tensor, values: Tensor, sign: int = 1) -> None:
        """to[..., units] += sign * values, for units that rise."""
        if len(self.units) == to.shape[-1]:
            to.add_(values, alpha=sign)
        else:
            to.index_add_(to.ndim - 1, self.units, values, alpha=sign)


class Round(NamedTuple):
    """Copies of which no two are of one unit. `last`, bool [n]: those after which there is none."""

    places: Index
    sources: Index
    last: Tensor


@dataclass(frozen=True)
class AxisMap:
    """`source` int64 [new]: the old unit that each new one copies, or FRESH. `scale`: what old units are multiplied
    with where they are written (hidden channels that are padded)."""

    source: Tensor
    old: int
    scale: float = 1.0

    @property
    def new(self) -> int:
        return len(self.source)

    @cached_property
    def same(self) -> bool:
        return self.new == self.old and torch.equal(self.source, torch.arange(self.old))

    @cached_property
    def fresh(self) -> Tensor:
        """bool [new]"""
        return self.source == FRESH

    @cached_property
    def copies(self) -> Tensor:
        """int64 [new]: how many units copy the same one, itself included; 1 for fresh ones."""
        counts = torch.bincount(self.source[~self.fresh], minlength=self.old)
        return torch.where(self.fresh, 1, counts[self.source.clamp(min=0)])

    @cached_property
    def rounds(self) -> list[Round]:
        """The first copies of all old units, then their second ones, and so on."""
        places = torch.arange(self.new)[~self.fresh]
        order = self.source[~self.fresh].sort(stable=True).indices
        places, sources = places[order], self.source[~self.fresh][order]
        number = torch.arange(len(sources)) - torch.searchsorted(sources, torch.arange(self.old))[sources]
        most = int(number.max()) + 1 if len(number) else 0
        found = [(places[number == n], sources[number == n]) for n in range(most)]
        return [Round(Index(to), Index(of), self.copies[to] == n + 1) for n, (to, of) in enumerate(found)]

    @cached_property
    def every(self) -> Index:
        """The old unit of each new one; for fresh ones, any."""
        return Index(torch.where(self.fresh, torch.arange(self.new) % max(self.old, 1), self.source))

    def widened(self, width: int) -> AxisMap:
        """The map of rows where each unit is a head of `width` rows."""
        rows = self.source[:, None] * width + torch.arange(width)
        return AxisMap(torch.where(self.fresh[:, None], FRESH, rows).flatten(), self.old * width, self.scale)

    def twice(self) -> AxisMap:
        """The map of two such vectors side by side."""
        second = torch.where(self.fresh, FRESH, self.source + self.old)
        return AxisMap(torch.cat((self.source, second)), 2 * self.old, self.scale)


def identity(size: int) -> AxisMap:
    return AxisMap(torch.arange(size), size)


def copied(old: int, new: int) -> AxisMap:
    """All old units, then copies of them in turn."""
    return AxisMap(torch.arange(new) % max(old, 1), old)


def padded(old: int, new: int) -> AxisMap:
    """All old units, then fresh ones."""
    return AxisMap(torch.cat((torch.arange(old), torch.full((new - old,), FRESH))), old)


def hidden_channels(old: int, new: int, *, copy: bool) -> AxisMap:
    """Copies where every channel gets equally many; else fresh channels beside rescaled old ones."""
    if copy and new % old == 0:
        return copied(old, new)
    return AxisMap(padded(old, new).source, old, (new / old) ** 0.5)


def heads(old: tuple[int, int], new: tuple[int, int], *, copy: bool) -> tuple[AxisMap, AxisMap]:
    """Maps of (query heads, key/value heads); `old` and `new` are their numbers (query heads, key/value heads).

    Query head i belongs to key/value head i // (queries / keys). With `copy` new heads are copies, else fresh ones
    wherever an old head need not stand twice. Raises InputError when the old heads find no place.
    """
    group, new_group = old[0] // old[1], new[0] // new[1]
    shrinks = new_group < group
    keys = torch.arange(new[1]) * old[1] // new[1] if shrinks else torch.arange(new[1]) % old[1]
    queries = torch.full((new[0],), FRESH)
    for key in range(old[1]):
        places = (keys[:, None] == key).expand(-1, new_group).flatten().nonzero().flatten()
        if len(places) < group:
            raise InputError(
                f"{new[0]} query and {new[1]} key/value heads have no place for the {group} query heads that shared "
                f"one key/value head of {old[1]}.",
                do="Grow the key/value heads to a multiple, or keep the query heads of a group together.",
            )
        filled = len(places) if copy else group
        queries[places[:filled]] = torch.arange(filled) % group + key * group
    used = (queries != FRESH).view(new[1], new_group).any(1)
    return AxisMap(queries, old[0]), AxisMap(torch.where(used, keys, FRESH), old[1])
