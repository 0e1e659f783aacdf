"""Products with weights that stay as they are for a while: where a chip reads a layout of its own faster, or keeps the
fp32 sums of bf16 products, that is used."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from anychip.chips.operators.cpu.library import RUNS_HERE
from anychip.chips.operators.override import is_right
from anychip.chips.operators.plain import wide

_LARGEST_DIFFERENCE = 4e-3  # of the norm: one rounding to bf16 is 2**-9 at most
_RUNS = (512, 1024, 256, 2048, 384, 768, 128, 64)
_ROUNDED = 1e-4  # fp32 sums differ by less than this, rounded ones by more


def packs_bf16(device: torch.device) -> bool:
    """Whether `packed_product` works on this device: compiled, and tried against fp64 once."""
    return device.type == "cpu" and RUNS_HERE and _proved()


def packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [tokens, in] -> x @ weight.T + bias for bf16 weight [out, in] and bias [out], where `packs_bf16`.

    Sums are in fp32, in the order in which PyTorch's product of many rows adds up where that was found out: a row has
    the same bits whatever rows are beside it, those of training.
    """
    from anychip.chips.operators.cpu.packed_product import PackedProduct

    return PackedProduct(weight, bias, run=_run_of(weight.shape[1]))


def wide_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x [tokens, in] -> x @ weight.T in fp32 or wider, for x of the dtype of weight [out, in].

    16-bit products are summed in fp32 and not rounded, where the chip has such a product; elsewhere they are rounded
    to 16 bits first. bf16 logits of 16 are 1/8 apart, and a probability of them is as coarse.
    """
    if weight.dtype.itemsize > 2 or isinstance(weight, FakeTensor):
        return lambda x: wide(x @ weight.t())
    if weight.dtype == torch.bfloat16 and packs_bf16(weight.device):
        from anychip.chips.operators.cpu.packed_product import PackedProduct

        return PackedProduct(weight, None, wide=True)
    if _keeps_sums(weight.device, weight.dtype):
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)
    return lambda x: (x @ weight.t()).float()


@functools.cache
def _keeps_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's product with an fp32 result is there for this device, and is not rounded in between."""
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16).to(dtype)
    exact, here = x.double() @ x.double().t(), x.to(device)
    try:
        found = torch.mm(here, here.t(), out_dtype=torch.float32).cpu().double()
    except (RuntimeError, TypeError):
        return False
    return bool((found - exact).norm() <= _ROUNDED * exact.norm())


@functools.cache
def _run_of(inputs: int) -> int:
    """How many inputs PyTorch's bf16 product adds up at a time, whose sums it then adds: found by products that cancel
    to nothing but rounding, which differs in every order. 0, all, where no order known here is its own."""
    from anychip.chips.operators.cpu.packed_product import PackedProduct

    generator = torch.Generator().manual_seed(20_250_115)
    x, weight = (torch.randn(rows, inputs // 2, generator=generator).bfloat16() for rows in (16, 32))
    filler = torch.zeros(32, inputs % 2, dtype=torch.bfloat16)
    x, weight = torch.cat((x, -x.flip(1), filler[:16]), 1), torch.cat((weight, weight.flip(1), filler), 1)
    right = x @ weight.t()
    for run in (0, *(run for run in _RUNS if run < inputs)):
        if torch.equal(PackedProduct(weight, None, run=run)(x), right):
            return run
    return 0


@functools.cache
def _proved() -> bool:
    return is_right("packed bf16 products run", _difference, _LARGEST_DIFFERENCE)


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
