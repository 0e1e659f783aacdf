"""A block of rows of a grown tensor, weights or moments, out of the old tensor's rows. The only arithmetic of growth.

Weights. A copied unit is made as its original is; what consumes it shares the original's weight among the copies,
unequally, each share a multiple of the weight's last bit, so that the shares add up to the weight without rounding.
Fresh units are drawn as at the start of training, and closed on one side: hidden channels where they are written, all
others where they are read.

Moments. They are of gradients, and scale as those do at the moment of growth: a unit among c copies gets 1/c of its
gradient, weights that were multiplied by f get 1/f of theirs; second moments take the square. Fresh parts start at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from anychip.grow.axes import AxisMap
from anychip.grow.plan import GrowthPlan
from anychip.grow.roles import Dim, roles_of, writes_residual
from anychip.grow.rows import Kind, Rows
from anychip.grow.upcycle import upcycled_block
from anychip.model.init import tensor_seed

BLOCK_ELEMENTS = 1 << 23
_STRIP_ELEMENTS = 1 << 19
"""What is computed at a time, for the arithmetic to find in cache what it left there."""

Shape = tuple[int, ...]


def row_blocks(shape: Shape) -> Iterator[range]:
    """The blocks that a grown tensor is written in: a function of its shape alone."""
    size = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], size):
        yield range(start, min(start + size, shape[0]))


def grown_strips(plan: GrowthPlan, kind: Kind, name: str, rows: range, old: Rows) -> Iterator[Tensor]:
    """These rows of the new tensor `name` (a parameter's), weights or moments as `kind` says; not of a step. Some at a
    time, from where a multiple of their number starts: all chance in them follows from the shape."""
    size = max(1, _STRIP_ELEMENTS // max(1, prod(axis.new for axis in _maps(plan, name)[1:])))
    bounds = [rows.start, *range((rows.start // size + 1) * size, rows.stop, size), rows.stop]
    for start, stop in pairwise(bounds):
        yield _grown_strip(plan, kind, name, range(start, stop), old)


def _grown_strip(plan: GrowthPlan, kind: Kind, name: str, rows: range, old: Rows) -> Tensor:
    if plan.upcycled(name):
        return upcycled_block(plan, kind, name, rows, old)
    dims, maps = roles_of(name), _maps(plan, name)
    if kind != "model":
        if plan.inserted(name) or plan.moments == "reset":
            some = old.rows(f"{kind}.{plan.parent_of(name)}", torch.arange(1))
            return some.new_zeros((len(rows), *(axis.new for axis in maps[1:])))
        return _moments(plan, kind, name, rows, _gather(plan, kind, name, rows, old, maps))
    shared = dims[-1].side == "in" and bool((maps[-1].copies > 1).any())
    block = _gather(plan, kind, name, rows, old, maps[:-1] if shared else maps)
    for dim, axis in zip(dims, maps, strict=True):
        if (factor := plan.factor(name, dim, axis)) != 1.0:
            block = block * factor
    chance = torch.Generator().manual_seed(tensor_seed(plan.seed, f"grow:{name}:{rows.start}"))
    if shared:
        block = _shared(block, maps[-1], plan.noise, chance)
    block = _fresh(plan, name, rows, block, old, chance)
    return block.mul_(plan.closed) if plan.inserted(name) and writes_residual(name) else block


def grown_step(plan: GrowthPlan, name: str, old_step: Tensor | None) -> Tensor:
    """AdamW's count of steps of a tensor: 0 for a new layer's or expert's."""
    starts = plan.inserted(name) or plan.upcycled(name) or plan.moments == "reset"
    return torch.zeros(()) if starts or old_step is None else old_step.clone()


def fresh_part(plan: GrowthPlan, name: str, *, closed: bool) -> tuple[Tensor, ...] | None:
    """Which rows, columns, ... of a parameter are fresh (bool, one a dimension; an element is fresh where one of them
    is); with `closed` only those that open. None where nothing is; a new layer's tensors count as a whole."""
    if plan.upcycled(name):
        return None
    dims, maps = roles_of(name), _maps(plan, name)
    if plan.inserted(name) and (writes_residual(name) or not closed):
        return tuple(torch.ones(axis.new, dtype=torch.bool) for axis in maps)
    found = tuple(
        axis.fresh if not closed or _closes(dim) else torch.zeros_like(axis.fresh)
        for dim, axis in zip(dims, maps, strict=True)
    )
    return found if any(bool(part.any()) for part in found) else None


def copied_part(plan: GrowthPlan, name: str, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Which rows, columns, ... of a parameter copy those of the old one that `part` (bool, one a dimension) names."""
    return tuple(
        side[axis.source.clamp(min=0)] & ~axis.fresh for side, axis in zip(part, _maps(plan, name), strict=True)
    )


def _maps(plan: GrowthPlan, name: str) -> list[AxisMap]:
    return [plan.axes[dim.axis] for dim in roles_of(name)]


def _closes(dim: Dim) -> bool:
    """On which side a fresh unit is closed: a hidden channel must not enter the mean square, so nothing writes it;
    another unit is not read. A token's row is neither."""
    return dim.side == "out" if dim.axis == "hidden" else dim.side == "in"


def _gather(plan: GrowthPlan, kind: Kind, name: str, rows: range, old: Rows, maps: list[AxisMap]) -> Tensor:
    """The old elements that the new ones copy along the first dimensions; where they are fresh, any."""
    first = _maps(plan, name)[0]
    units = first.source[rows.start : rows.stop].clamp(min=0)
    block = old.rows(f"{kind}.{plan.parent_of(name)}", units)
    for place, axis in enumerate(maps[1:], 1):
        block = block if axis.same else axis.every.take(block, place)
    return block


def _along(values: Tensor, place: int, dimensions: int) -> Tensor:
    """[n] as a tensor that broadcasts along dimension `place`."""
    return values.view([-1 if n == place else 1 for n in range(dimensions)])


def _part(values: Tensor, place: int, rows: range) -> Tensor:
    return values[rows.start : rows.stop] if place == 0 else values


def _moments(plan: GrowthPlan, kind: Kind, name: str, rows: range, block: Tensor) -> Tensor:
    power = 2 if kind == "optimizer.exp_avg_sq" else 1
    for place, (dim, axis) in enumerate(zip(roles_of(name), _maps(plan, name), strict=True)):
        factor = torch.ones(axis.new, dtype=torch.float64)
        if dim.side in ("out", "gain", "last_gain"):
            factor /= axis.copies
        factor = _part(factor / plan.factor(name, dim, axis), place, rows)
        if bool((factor != 1).any()):
            block = block * _along((factor**power).to(block.dtype), place, block.ndim)
        if bool(axis.fresh.any()):
            block = block.masked_fill(_along(_part(axis.fresh, place, rows), place, block.ndim), 0)
    return block


def _shared(block: Tensor, axis: AxisMap, noise: float, chance: torch.Generator) -> Tensor:
    """Old weights [..., old] -> [..., new]: each becomes its copies' shares, which add up to it exactly."""
    weights = _uniform((*block.shape[:-1], axis.new), chance).mul_(noise).add_(1)
    total = torch.zeros(block.shape, dtype=torch.float32)
    for places, sources, _ in axis.rounds:
        sources.add(total, places.take(weights, -1))
    unit, rest = _last_bit(block), block.clone()
    out = axis.every.take(block, -1)
    for places, sources, last in axis.rounds:
        left = sources.take(rest, -1)
        if bool(last.all()):
            places.put(out, left)
            break
        own = sources.take(unit, -1)
        share = (places.take(weights, -1) / sources.take(total, -1)).to(block.dtype).mul_(sources.take(block, -1))
        share.div_(own).round_().mul_(own)
        share = torch.where(last, left, share) if bool(last.any()) else share
        places.put(out, share)
        sources.add(rest, share, -1)
    return out


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _last_bit(x: Tensor) -> Tensor:
    """The value of the last bit of each element, or the smallest normal number where that is larger."""
    integer, kind = _INTEGERS[x.element_size()], torch.finfo(x.dtype)
    exponent = torch.full((), torch.inf, dtype=x.dtype).view(integer)  # has all its bits, and no others
    return (x.view(integer) & exponent).view(x.dtype).mul_(kind.eps).clamp_(min=kind.tiny)


def _uniform(shape: Shape, chance: torch.Generator) -> Tensor:
    """fp32 between -1 and 1, in steps of 2^-15: four of them from one draw, which is what takes the time."""
    draws = torch.empty(-(-prod(shape) // 4), dtype=torch.int64).random_(-(2**63), None, generator=chance)
    return draws.view(torch.int16)[: prod(shape)].view(shape).to(torch.float32).mul_(2.0**-15)


def _fresh(plan: GrowthPlan, name: str, rows: range, block: Tensor, old: Rows, chance: torch.Generator) -> Tensor:
    """Values of fresh elements: closed ones multiplied by what closed means."""
    dims, maps = roles_of(name), _maps(plan, name)
    fresh = torch.zeros((), dtype=torch.bool)
    shut = torch.zeros((), dtype=torch.bool)
    for place, (dim, axis) in enumerate(zip(dims, maps, strict=True)):
        here = _along(_part(axis.fresh, place, rows), place, block.ndim)
        if dim.side == "row":
            if bool(here.any()):
                block = torch.where(here, _mean_row(plan, name, old, block), block)
            continue
        fresh = fresh | here
        if _closes(dim) and not (plan.inserted(name) and writes_residual(name)):  # those close as a whole
            shut = shut | here
    if not bool(fresh.any()):
        return block
    if dims[0].side in ("gain", "last_gain"):
        mean = old.rows(f"model.{plan.parent_of(name)}", torch.arange(maps[0].old)).mean()
        mean = mean * plan.factor(name, dims[0], maps[0])
        return torch.where(fresh, mean, block)
    if name.endswith("bias"):  # as at the start of training
        return torch.where(fresh, 0, block)
    std = plan.new.initializer_range
    if writes_residual(name):
        std /= (2 * plan.new.num_hidden_layers) ** 0.5
    drawn = torch.empty(block.shape, dtype=torch.float32).normal_(0.0, std, generator=chance).to(block.dtype)
    return torch.where(fresh, torch.where(shut, drawn * plan.closed, drawn), block)


def _mean_row(plan: GrowthPlan, name: str, old: Rows, block: Tensor) -> Tensor:
    """A new token starts as the mean of the old ones (bounded change of the other tokens' probabilities)."""
    mean = old.mean_row(f"model.{plan.parent_of(name)}")
    (dim, axis) = roles_of(name)[1], _maps(plan, name)[1]
    grown = mean[axis.source.clamp(min=0)] * plan.factor(name, dim, axis)
    return grown / axis.copies.to(grown.dtype) if dim.side == "in" else grown
