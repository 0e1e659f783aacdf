"""The ranks of a pipeline: where one stands, what it holds, how many micro-batches wait on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anychip.plan.shapes import Work
from anychip.plan.table import DUALPIPE_V, GPIPE, INTERLEAVED, ZERO_BUBBLE, Table, ends_meet
from anychip.plan.types import Floats


@dataclass(frozen=True)
class Rank:
    """A pipeline rank of every layout: where it stands and what it holds, each [n]."""

    position: Floats  # 0 for the first
    layers: Floats
    share: Floats  # of its layers that have experts
    first: Floats  # 1 when it holds the embedding
    last: Floats  # 1 when it holds the head


def rank_at(w: Work, t: Table, where: str) -> Rank:
    """The first rank, the fullest inner one, or the last."""
    meet = ends_meet(t).astype(np.float64)
    zero = np.zeros(len(t))
    if where == "first":
        return rank_of(w, t, zero, t.first_layers, zero + 1, meet)
    if where == "inner":
        return rank_of(w, t, t.inner_place, t.inner_layers, zero, zero)
    return rank_of(w, t, t.pp - 1, t.last_layers, (t.pp == 1).astype(np.float64), np.maximum(1 - meet, t.pp == 1))


def rank_of(w: Work, t: Table, position: Floats, layers: Floats, first: Floats, last: Floats) -> Rank:
    """A rank with its share of expert layers: leading dense layers lie on the first rank as far as they fit."""
    dense = np.minimum(w.dense_first, t.first_layers)
    first_share = np.maximum(0.0, w.moe_layers / np.maximum(w.layers - w.dense_first, 1)) * (1 - dense / t.first_layers)
    rest = np.maximum(w.layers - t.first_layers, 1)
    other = np.minimum(1.0, np.maximum(0.0, w.moe_layers - first_share * t.first_layers) / rest)
    return Rank(position, layers, np.where(first > 0, first_share, other), first, last)


def in_flight(t: Table, position: Floats, m: Floats) -> Floats:
    """Micro-batches whose activations a rank holds at once, in units of all its layers."""
    plain = np.minimum(m, t.pp - position)
    chunks = (t.pp - position - 1) * 2 + (t.vpp - 1) * t.pp + 1
    interleaved = np.minimum(m * t.vpp, chunks) / t.vpp
    folded = np.minimum(m, (2 * t.pp + 1) / 2)  # two chunks in a V: as much on every rank
    v_shaped = (t.schedule == DUALPIPE_V) | ((t.schedule == ZERO_BUBBLE) & (t.vpp == 2))
    return np.select([t.schedule == GPIPE, t.schedule == INTERLEAVED, v_shaped], [m, interleaved, folded], plain)
