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
    return summarize_with(x, row_signs(rows, x), column_signs(columns, x))


def summarize_with(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `summarize`, with the signs of x's rows [r, 17] and columns [c, 17].

    x is read three times: once to be widened, for its norms and for the product with `right`, whose ones leave the sum
    in a corner of the result.
    """
    x = x.detach().to(left.dtype)
    squares = _sum_of_squares(x)
    nonfinite = squares.new_zeros(())
    # On the CPU looking at the sum costs nothing and shows whether there are any; a chip would have to be waited for.
    if x.device.type != "cpu" or not squares.isfinite():
        finite = x.isfinite()
        nonfinite = (x.numel() - finite.sum()).to(x.dtype)
        x = torch.where(finite, x, 0.0)
        squares = _sum_of_squares(x)
    product = left.mT @ (x @ right)
    head = torch.stack((squares.new_tensor(float(x.numel())), product[WIDTH, WIDTH], squares, nonfinite))
    return torch.cat((head, product[:WIDTH, :WIDTH].flatten() / WIDTH))


def row_signs(numbers: Tensor, like: Tensor) -> Tensor:
    """[r, 17]: the signs of rows of these numbers, and ones; where `like` is, in the dtype that it is summarized in."""
    return _signs_of(numbers, _ROW_SALT, like)


def column_signs(numbers: Tensor, like: Tensor) -> Tensor:
    """As `row_signs`, of columns."""
    return _signs_of(numbers, _COLUMN_SALT, like)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Row by row: a norm in one go would add up millions of numbers in a few registers."""
    return torch.linalg.vector_norm(x, dim=1).square().sum()


def _signs_of(numbers: Tensor, salt: int, like: Tensor) -> Tensor:
    """Those of a run of numbers are kept."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    first, count = int(numbers[0]) if len(numbers) else 0, len(numbers)
    if count and int(numbers[-1]) - first == count - 1 and bool((numbers[1:] > numbers[:-1]).all()):
        return _signs_of_run(first, count, salt, like.device, dtype)
    return _signs(numbers, salt).to(like.device, dtype)


@lru_cache(maxsize=256)
def _signs_of_run(first: int, count: int, salt: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _signs(torch.arange(first, first + count), salt).to(device, dtype)


def _signs(numbers: Tensor, salt: int) -> Tensor:
    mixed = _mix(numbers + salt)
    bits = (mixed[:, None] >> torch.arange(WIDTH)) & 1
    ones = torch.ones(len(numbers), 1, dtype=bits.dtype)
    return torch.cat((2 * bits - 1, ones), dim=1).to(torch.float32)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer, on int64 that wraps around; right shifts are made logical."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, shift)) * multiplier
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)
