"""Grouped products of bf16 rows by csrc/grouped.cpp: one call for all experts, where PyTorch makes one an expert, which
few rows do not fill."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain_experts
from anychip.chips.operators.cpu.library import RUNS_HERE, load

_LANES = 16


def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """See contract.GroupedMatmul."""
    if not (RUNS_HERE and x.dtype == torch.bfloat16 and not any(size % _LANES for size in weights.shape[1:])):
        return plain_experts.grouped_matmul(x, weights, counts)
    out: Tensor = _GroupedMatmul.apply(x, weights, counts)
    return out


class _GroupedMatmul(torch.autograd.Function):
    """The kernels want weights as [experts, n, k], which is how they are kept; what comes here is their transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, counts)
        out = x.new_empty(len(x), weights.shape[2])
        _call("grouped_forward", x, weights.mT, out, counts)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights, counts = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            _call("grouped_backward_rows", grad, weights.mT, grad_x, counts)
        if ctx.needs_input_grad[1]:
            grad_weights = torch.empty_like(weights.mT, memory_format=torch.contiguous_format)
            _call("grouped_backward_weights", grad, x, grad_weights, counts)
            grad_weights = grad_weights.mT
        return grad_x, grad_weights, None


def _call(name: str, first: Tensor, second: Tensor, result: Tensor, counts: Tensor) -> None:
    """`result` is contiguous; sizes follow from whichever of the three are the weights [experts, n, k]."""
    first, second, counts = first.contiguous(), second.contiguous(), counts.contiguous()
    weights = result if result.ndim == 3 else second
    n, k = weights.shape[1:]
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (first, second, result, counts)]
    sizes = [ctypes.c_int64(size) for size in (len(counts), k, n)]
    getattr(load(), name)(*addresses, *sizes)
