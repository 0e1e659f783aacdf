"""Where each layer of the deeper model comes from, and where new ones stand.

A new layer is a copy whose writes into the residual stream are closed: it passes on what it gets until they open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip.errors import InputError


@dataclass(frozen=True)
class LayerMap:
    """`source[n]`: the old layer that new layer n copies; `inserted[n]`: whether it is new."""

    source: tuple[int, ...]
    inserted: tuple[bool, ...]


def deepen(old: int, new: int, where: str, distances: Sequence[float] | None = None) -> LayerMap:
    """`top`: copies of the last layers behind them (all of them, again, when there are more). `even`: spread evenly,
    each behind the layer it copies (as arXiv 2305.02869 inserts). `distance`: behind the layers that change their input
    least, by `distances` [old] (after arXiv 2407.02783), equally often at most once more than others."""
    extra = new - old
    if where == "top":
        tail = [old - 1 - (extra - 1 - n) % old for n in range(extra)] if extra else []
        return LayerMap((*range(old), *tail), (False,) * old + (True,) * extra)
    if where == "even":
        counts = [(n + 1) * extra // old - n * extra // old for n in range(old)]
    elif where == "distance":
        if distances is None or len(distances) != old:
            raise InputError(f"layers by distance need a distance for each of the {old} layers.")
        ranked = sorted(range(old), key=lambda n: (distances[n], n))
        counts = [extra // old] * old
        for n in ranked[: extra % old]:
            counts[n] += 1
    else:
        raise InputError(f"layers {where!r} is not a way to insert layers.", do="Allowed: top, even, distance.")
    source: list[int] = []
    inserted: list[bool] = []
    for layer, count in enumerate(counts):
        source += [layer] * (count + 1)
        inserted += [False] + [True] * count
    return LayerMap(tuple(source), tuple(inserted))
