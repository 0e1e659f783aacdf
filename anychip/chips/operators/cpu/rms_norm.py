"""RMSNorm of bf16 rows by csrc/rms_norm.cpp, forward and backward: one call in place of eight small operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain
from anychip.chips.operators.cpu.library import RUNS_HERE, load

_BLOCK = 32  # csrc/rms_norm.cpp, kBlock


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number a row for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad, given, scale = grad_outputs[0].contiguous(), x.contiguous(), weight.float().contiguous()
        width = x.shape[-1]
        rows = given.numel() // width
        grad_x = torch.empty_like(given)
        blocks = scale.new_empty(-(-rows // _BLOCK), width)
        addresses = [each.data_ptr() for each in (grad, given, scale, rstd, grad_x, blocks)]
        load().rms_norm_backward(*addresses, rows, width)
        return grad_x, blocks.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See contract.RmsNorm."""
    if not RUNS_HERE or x.dtype != torch.bfloat16 or weight.shape != x.shape[-1:]:
        return plain.rms_norm(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normed: Tensor = _RmsNorm.apply(x, weight, eps)
        return normed
    return _normed(x, weight, eps)[0]


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and rstd [rows] fp32."""
    x, scale = x.contiguous(), weight.float().contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y, rstd = torch.empty_like(x), scale.new_empty(rows)
    load().rms_norm(x.data_ptr(), scale.data_ptr(), eps, y.data_ptr(), rstd.data_ptr(), rows, width)
    return y, rstd
