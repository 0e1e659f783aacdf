"""Chips that PyTorch drives as it drives NVIDIA's, by its own kernels: NVIDIA, AMD, Hygon, MetaX, Iluvatar.

Attention itself needs no override: the reference calls scaled_dot_product_attention, which picks the chip's kernel.
Argument lists are those of PyTorch 2.13's schemas. `grouped_matmul` and `adamw` ran on a CPU, the attention blocks on
no hardware: the trial before first use decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain_attention
from anychip.chips.operators.fused_adamw import FUSED_ADAMW
from anychip.chips.operators.override import Override


def _fits(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """The flash kernel knows 16-bit inputs, no mask, and causal attention of equal lengths."""
    return q.dtype in (torch.float16, torch.bfloat16) and mask is None and (not causal or q.shape[2] == k.shape[2])


def _attention_with_lse(aten: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    """aten::_scaled_dot_product_flash_attention: results 0 and 1. Source: PyTorch's schema."""

    @torch.no_grad()
    def attention_with_lse(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not _fits(q, k, causal, mask):
            return plain_attention.attention_with_lse(q, k, v, scale=scale, causal=causal, mask=mask)
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return found[0], found[1]

    return attention_with_lse


def _attention_backward(aten: ModuleType) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Its backward. Without dropout the random state is not read; without packing there are no cumulative lengths.

    Source: PyTorch's schema and torch.distributed.tensor's ring attention, which calls it the same way.
    """

    @torch.no_grad()
    def attention_backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _fits(q, k, causal, mask):
            return plain_attention.attention_backward(
                grad_out, q, k, v, out, lse, scale=scale, causal=causal, mask=mask
            )
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        lengths = q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, *lengths, 0.0, causal, unused, unused[0], scale=scale
        )

    return attention_backward


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Callable[..., Tensor], x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x, weights, ends)
        return product(x, weights, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        x, weights, ends = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_x = ctx.product(grad, weights.mT, offs=ends) if ctx.needs_input_grad[1] else None
        grad_weights = ctx.product(x.t(), grad, offs=ends) if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_weights, None


def _grouped_matmul(torch_module: ModuleType) -> Callable[..., Tensor]:
    """torch._grouped_mm with cumulative counts. Source: PyTorch 2.13 (aten::_grouped_mm), tried on a CPU."""

    def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        ends = counts.to(x.device).cumsum(0).to(torch.int32)
        return _GroupedMatmul.apply(torch_module._grouped_mm, x, weights, ends)

    return grouped_matmul


PORTABLE: Mapping[str, Override] = {
    "grouped_matmul": Override("torch", ("_grouped_mm",), _grouped_matmul),
    "adamw": FUSED_ADAMW,
}
OVERRIDES: Mapping[str, Override] = {
    **PORTABLE,
    "attention_with_lse": Override("torch", (), lambda torch_module: _attention_with_lse(torch_module.ops.aten)),
    "attention_backward": Override("torch", (), lambda torch_module: _attention_backward(torch_module.ops.aten)),
}
