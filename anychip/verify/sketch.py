"""A few numbers of a tensor from which to tell how far it lies from another one, whoever holds which part of either.

A tensor x [rows, columns] is multiplied from both sides by signs that depend on nothing but the global numbers of its
rows and columns: s = A x B / 16 with A [16, rows] and B [columns, 16] of +1 and -1. s is linear in x, so that parts add
up over micro-batches and processes, whatever the layout; and |s(x) - s(y)|^2 is |x - y|^2 on average over the signs,
with a relative standard deviation of 9 % for a difference spread over many rows and columns and of about 50 % for one
that is a single row times a single column (arXiv 0808.2724 studies such products of signs). No element is kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 16
COUNT, SUM, SQUARES, NONFINITE = range(4)
LENGTH = 4 + WIDTH * WIDTH
_ROW_SALT, _COLUMN_SALT = 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # of splitmix64, as signed numbers


def summarize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[260]: count, sum, sum of squares and number of infinities and NaN (which count as zero in the rest), sketch.

    x [r, c] on any device; rows [r] and columns [c] int64 on the CPU say where it lies in the whole. In fp32, or in
    fp64 if x is.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    finite = x.isfinite()
    nonfinite = x.numel() - finite.sum()
    x = torch.where(finite, x, 0.0)
    left = _signs_of(rows, _ROW_SALT).to(x.device, x.dtype)
    right = _signs_of(columns, _COLUMN_SALT).to(x.device, x.dtype)
    sketch = (left.mT @ x @ right).flatten() / WIDTH
    head = torch.stack((x.new_tensor(float(x.numel())), x.sum(), x.square().sum(), nonfinite.to(x.dtype)))
    return torch.cat((head, sketch))


def _signs_of(numbers: Tensor, salt: int) -> Tensor:
    """[n, 16] of +1 and -1; those of a run of numbers are kept."""
    first, count = int(numbers[0]) if len(numbers) else 0, len(numbers)
    if count and int(numbers[-1]) - first == count - 1 and bool((numbers[1:] > numbers[:-1]).all()):
        return _signs_of_run(first, count, salt)
    return _signs(numbers, salt)


@lru_cache(maxsize=256)
def _signs_of_run(first: int, count: int, salt: int) -> Tensor:
    return _signs(torch.arange(first, first + count), salt)


def _signs(numbers: Tensor, salt: int) -> Tensor:
    mixed = _mix(numbers + salt)
    bits = (mixed[:, None] >> torch.arange(WIDTH)) & 1
    return (2 * bits - 1).to(torch.float32)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer, on int64 that wraps around; right shifts are made logical."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, shift)) * multiplier
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)
