"""Cambricon: fused operators of `torch_mlu_ops`, a package made for inference: it has no gradients.

So backward goes through the reference, which repeats the forward pass; that pays because these operators are bound by
memory and their forward passes by launches. Attention needs no override: torch_mlu has its own
scaled_dot_product_attention. Argument order as in dlinfer (vendor/camb), vllm_mlu and lightx2v, which call the same
functions. None of this has run on hardware: the trial before first use decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain
from anychip.chips.operators.override import Override


class _BackwardByReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*inputs)
        return fast(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            out = ctx.reference(*inputs)
        found = iter(torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad_outputs))
        return None, None, *(next(found) if w else None for w in wanted)


def _rms_norm(tmo: ModuleType) -> Callable[..., Tensor]:
    """fused_rms_norm(x [rows, h], residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale), in fp32
    because x and gamma must have one dtype. Source: dlinfer, lightx2v."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        def fast(x: Tensor, weight: Tensor) -> Tensor:
            rows = x.float().reshape(-1, x.shape[-1])
            normed = tmo.fused_rms_norm(rows, None, weight.float(), None, None, eps, False, None)
            return normed.view(x.shape).to(x.dtype)

        return _BackwardByReference.apply(fast, lambda x, weight: plain.rms_norm(x, weight, eps), x, weight)

    return rms_norm


def _rotate(tmo: ModuleType) -> Callable[..., Tensor]:
    """apply_rotary(x [b, s, heads, d], sin, cos [s, d], position_ids, cu_seqlens, interleaved, discrete, dynamic_ntk,
    max_seqlen), in fp32 and on a copy, since some releases write into x. Source: dlinfer, lightx2v."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def fast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            whole_cos, whole_sin = (torch.cat((half, half), dim=-1) for half in (cos, sin))
            copy = x.to(torch.float32, copy=True)
            turned = tmo.apply_rotary(copy, whole_sin, whole_cos, None, None, False, False, False, x.shape[1])
            return turned.to(x.dtype)

        return _BackwardByReference.apply(fast, plain.rotate, x, cos, sin)

    return rotate


def _swiglu(tmo: ModuleType) -> Callable[..., Tensor]:
    """active(x [rows, 2 f], act_mode="silu", is_gated=True) of gate and up side by side. Source: dlinfer."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        def fast(gate: Tensor, up: Tensor) -> Tensor:
            both = torch.cat((gate, up), dim=-1).reshape(-1, 2 * gate.shape[-1])
            return tmo.active(both, act_mode="silu", is_gated=True).view(gate.shape)

        return _BackwardByReference.apply(fast, plain.swiglu, gate, up)

    return swiglu


OVERRIDES: Mapping[str, Override] = {
    "rms_norm": Override("torch_mlu_ops", ("fused_rms_norm",), _rms_norm),
    "rotate": Override("torch_mlu_ops", ("apply_rotary",), _rotate),
    "swiglu": Override("torch_mlu_ops", ("active",), _swiglu),
}
