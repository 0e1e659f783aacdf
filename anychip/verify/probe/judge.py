"""How far a result may lie from the exact one, and what is wrong with one that lies farther.

u is half a unit in the last place of a dtype: 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32. A result that is
computed exactly and rounded once is off by about u / sqrt(3) of its norm and by u at most. Each further rounding on the
way to it, of a factor or of an intermediate, adds as much at most: a case says how many there are (`roundings`). A sum
of n terms in float32 adds about u32 * sqrt(n) of the norm of its terms, whatever their order, because rounding errors
of both signs cancel; we allow s = 4 * u32 * (1 + sqrt(n)). So

    norm    |found - exact| / |exact|            <=  roundings * u + s
    rows    the same for each row and column     <=  8 x that, of at least a quarter of a typical row
    bias    the part of the difference that is   <=  roundings * u / 4 + 6 * (off by the norm) / sqrt(elements) + s
            parallel to the exact result             where elements are as many as share the norm
    factor  the same of each row by itself       <=  2 * (off by the norm) / sqrt(elements of a row) + s
            (root mean square over rows)             where a row is divided by one number that float32 computes

Elements near zero do not decide: nothing is judged element by element. The bias finds what norms hide: cutting off
instead of rounding is off by 0.7 u in one direction, and a sum that is 0.4 % too large lies inside bfloat16's limit of
the norm. The factor finds a mean square that was rounded to bfloat16: every row is then up to u / 2 too large or too
small, which no norm shows and which cancels over rows. Rounding the elements of a row one by one leaves the row as a
whole off by 1 / sqrt(elements) of that, a seventeenth for a thousand normal numbers. Infinities and NaN must be where
the exact result has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_ACCUMULATE, _ROWS, _SMALL_ROW = 4.0, 8.0, 0.25
_BIAS, _DEVIATIONS = 0.25, 6.0
_FACTOR = 2.0
_FEWEST = 8  # rows or columns that can be told apart


@dataclass(frozen=True)
class Limits:
    """Largest share of the norm that a result may be off by, and of it in one direction; and how much of both is for
    sums in float32."""

    norm: float
    bias: float
    summing: float


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a result: `kind` in words, how far it is off, how far it may be."""

    kind: str
    measured: float
    limit: float


def limits(dtype: torch.dtype, length: int, roundings: float) -> Limits:
    """For results in `dtype` of sums of `length` terms."""
    unit = UNIT[dtype]
    u32 = min(UNIT[torch.float32], unit) if dtype == torch.float64 else UNIT[torch.float32]
    summing = _ACCUMULATE * u32 * (1 + length**0.5)
    return Limits(roundings * unit + summing, _BIAS * roundings * unit + summing, summing)


def flaw(
    found: Tensor, exact: Tensor, allowed: Limits, size: float | None = None, *, one_factor: bool = False
) -> Flaw | None:
    """What is wrong with a result, if anything; `size` is the norm that counts where the result's own is near zero,
    `one_factor`: each row is divided by one number in float32, and no two rows are alike."""
    found, exact = found.detach().to("cpu", torch.float64), exact.detach().to("cpu", torch.float64)
    if found.shape != exact.shape:
        return Flaw(f"has the shape {list(found.shape)} instead of {list(exact.shape)}", 1.0, 0.0)
    special = ~exact.isfinite()
    misplaced = (found.isfinite() == special) | (special & (found.nan_to_num() != exact.nan_to_num()))
    if misplaced.any():
        return Flaw("has infinities or NaN in the wrong places", misplaced.double().mean().item(), 0.0)
    difference, exact = (torch.where(special, 0.0, x) for x in (found - exact, exact))
    whole = size if size is not None else exact.norm().item()
    if whole == 0.0:
        return Flaw("should be zero", difference.norm().item(), 0.0) if difference.any() else None
    off = difference.norm().item() / whole
    if off > allowed.norm:
        return Flaw("is wrong", off, allowed.norm)
    leaning = abs((difference * exact).sum().item()) / whole**2
    bias = allowed.bias + _DEVIATIONS * off / _elements(exact) ** 0.5
    if leaning > bias:
        return Flaw("leans to one side", leaning, bias)
    if one_factor:
        leaning, chance = _leaning_rows(difference, exact)
        if leaning > (factor := _FACTOR * chance + allowed.summing):
            return Flaw("is too large or too small by rows", leaning, factor)
    if size is None and (worst := _worst_line(difference, exact)) > _ROWS * allowed.norm:
        return Flaw("is wrong in places", worst, _ROWS * allowed.norm)
    return None


def _elements(exact: Tensor) -> float:
    """How many elements share the norm: all of equal ones, one where one outweighs the others."""
    squares = exact.square() / exact.square().max()
    return (squares.sum().square() / squares.square().sum()).item()


def _leaning_rows(difference: Tensor, exact: Tensor) -> tuple[float, float]:
    """By how much rows are too large or too small, and by how much rounding each of their elements makes them so; root
    mean squares over rows, as shares of a row's norm."""
    off, right = difference.flatten(0, -2), exact.flatten(0, -2)
    squares = right.square().sum(-1)
    leaning = (off * right).sum(-1) / squares
    share = off.square().sum() / squares.sum()
    chance = share * right.pow(4).sum(-1) / squares.square()
    return leaning.square().mean().sqrt().item(), chance.mean().sqrt().item()


def _worst_line(difference: Tensor, exact: Tensor) -> float:
    """The largest relative error of a row or column."""
    if exact.dim() < 2:
        return 0.0
    worst = 0.0
    off, right = difference.flatten(0, -2), exact.flatten(0, -2)
    for axis in (0, 1):
        if min(off.shape) >= _FEWEST:
            sizes = right.norm(dim=axis)
            typical = sizes.square().mean().sqrt()
            worst = max(worst, (off.norm(dim=axis) / sizes.clamp(min=_SMALL_ROW * typical.item())).max().item())
    return worst
