"""Products with weights that never change: where a chip reads a layout of its own faster, they are kept in it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from anychip.chips.operators.cpu.library import RUNS_HERE
from anychip.chips.operators.override import OperatorFallback

_LARGEST_DIFFERENCE = 4e-3  # of the norm: one rounding to bf16 is 2**-9 at most


def packs_bf16(device: torch.device) -> bool:
    """Whether `packed_product` works on this device: compiled, and tried against fp64 once."""
    return device.type == "cpu" and RUNS_HERE and _proved()


def packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [tokens, in] -> x @ weight.T + bias for bf16 weight [out, in] and bias [out], where `packs_bf16`.

    Sums are in fp32, in the order of the inputs: a row has the same bits whatever rows are beside it.
    """
    from anychip.chips.operators.cpu.packed_product import PackedProduct

    return PackedProduct(weight, bias)


@functools.cache
def _proved() -> bool:
    try:
        difference = _difference()
        if difference <= _LARGEST_DIFFERENCE:  # false for NaN
            return True
        reason = f"its result differs from the reference by {difference:.2g} of its norm"
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(f"packed bf16 products run as plain PyTorch: {reason}", OperatorFallback, stacklevel=3)
    return False


def _difference() -> float:
    """The largest over numbers of rows, for sizes that end inside a panel and inside a pair."""
    generator = torch.Generator().manual_seed(20_250_115)
    weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((150, 77), (150,)))
    product, largest = packed_product(weight, bias), 0.0
    for rows in range(1, 9):
        x = torch.randn(rows, 77, generator=generator).bfloat16()
        right = x.double() @ weight.double().t() + bias.double()
        largest = max(largest, ((product(x).double() - right).norm() / right.norm()).item())
    return largest
