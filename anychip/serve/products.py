"""Weight matrices held the way one step of decoding reads them fastest.

Decoding one token reads every weight once, so its speed is the speed of memory, provided that the product keeps up.
bf16 products do so on a chip that multiplies bf16 in hardware; on a CPU that has such units in panels of our own, which
each thread reads from one end to the other. On a CPU that has none they fall behind by half, and packed fp16 weights
take their place (FBGEMM's layout, read 16 columns at a time, products and sums in fp32). fp32 weights lie transposed
on a CPU: a vector times [in, out] is read in order by all threads, the usual [out, in] by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.backend import detect_backend
from anychip.chips.operators.prepared import packed_product, packs_bf16, wide_product
from anychip.errors import InputError

# bf16 has 8 significant bits and fp16 has 11, so every bf16 weight from 2**-17 to 65,504 is an fp16 number. A smaller
# one moves by at most 2**-25; a matrix that loses more than this share of its norm keeps its own dtype.
_LARGEST_LOSS = 2.0**-14

_INT8_ROWS = 16  # above, one product of unpacked weights is faster

Product = Callable[[Tensor], Tensor]  # [tokens, in] -> [tokens, out] in the activation dtype


@dataclass(frozen=True)
class Precision:
    """weights: how matrices are stored. activations: dtype of everything between them. packed: fp16 by FBGEMM.
    panels: bf16 in panels, by a kernel that gives a row the same bits whatever is beside it. int8: 8 bits and one scale
    an output row, for products with bf16 or fp32 rows."""

    weights: torch.dtype
    activations: torch.dtype
    packed: bool = False
    panels: bool = False
    int8: bool = False


def choose_precision(weights: torch.dtype, device: torch.device, *, int8: bool = False) -> Precision:
    """How weights of this dtype (fp32 or bf16) are best read on this device. Depends on the chip, never on a clock."""
    if int8:
        if device.type != "cpu":
            raise InputError("int8 weights are for the CPU.", where="weights", do="Use bf16 on this device.")
        return Precision(weights, torch.bfloat16, int8=True)
    if weights == torch.float32 or device.type != "cpu" or detect_backend().multiplies_bf16():
        return Precision(weights, weights, panels=weights == torch.bfloat16 and packs_bf16(device))
    if "fbgemm" in torch.backends.quantized.supported_engines:
        return Precision(weights, torch.float32, packed=True)
    return Precision(weights, weights)


def make_product(weight: Tensor, bias: Tensor | None, precision: Precision) -> Product:
    """x -> x @ weight.T + bias, for weight [out, in] and bias [out]. Keeps its own copy of what it needs."""
    weight = weight.detach().to(precision.weights)
    bias = None if bias is None else bias.detach().to(precision.weights)
    if precision.int8:
        return _int8_product(weight, bias, precision.activations)
    if precision.panels:
        return packed_product(weight, bias)
    if precision.packed and _fits_fp16(weight):
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    dtype = precision.activations
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if dtype != torch.float32 or weight.device.type != "cpu":
        return lambda x: F.linear(x, weight, bias)
    transposed = weight.t().contiguous()
    return (lambda x: x @ transposed) if bias is None else (lambda x: torch.addmm(bias, x, transposed))


def make_head(weight: Tensor, precision: Precision) -> Product:
    """The output head [vocab, h], as `make_product` but with results in fp32: logits are not rounded to 16 bits."""
    if precision.activations.itemsize > 2 or precision.int8:
        product = make_product(weight, None, precision)
        return lambda x: product(x).float()
    return wide_product(weight.detach().to(precision.activations))


def _int8_product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """Symmetric, one scale an output row: |error| of a weight is at most 1/254 of the row's largest."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
    packed = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    bias = None if bias is None else bias.to(dtype)

    def product(x: Tensor) -> Tensor:
        if len(x) <= _INT8_ROWS:
            y = torch._weight_int8pack_mm(x.contiguous(), packed, scale)
        else:
            y = F.linear(x, packed.to(dtype)) * scale
        return y if bias is None else y + bias

    return product


def _fits_fp16(weight: Tensor) -> bool:
    exact = weight.float()
    lost = torch.linalg.vector_norm(exact - exact.half().float())
    return bool(
        lost <= _LARGEST_LOSS * torch.linalg.vector_norm(exact)
    )  # false for an overflow, which gives nan or inf
