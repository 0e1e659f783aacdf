"""Huawei Ascend: fused operators of `torch_npu`.

Names and argument lists are those that torch_npu 2.13.0 registers, read from the wheel; conventions (1 = hidden, whole
cos and sin, gate and up side by side, cumulative group lists) are from the vendor's operator documents, named at each
function. None of this has run on hardware: the trial before first use decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain, plain_experts
from anychip.chips.operators.fused_adamw import FUSED_ADAMW
from anychip.chips.operators.override import Override
from anychip.chips.operators.plain_attention import visible_past

_LSE_COPIES = 8  # the kernel keeps row maxima and sums eight times, [b, n, s, 8]
_COMPRESSED_MASK = 2048  # side of the triangle that stands for a causal mask of any length
_MASK_AS_GIVEN, _CAUSAL_AT_END = 1, 3  # sparse_mode


class _Masks:
    """Mask arguments of the attention kernel. The causal triangle of each device is made once."""

    def __init__(self) -> None:
        self._triangles: dict[torch.device, Tensor] = {}

    def arguments(self, q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> dict[str, Any]:
        queries, keys = q.shape[2], k.shape[2]
        if mask is not None:
            visible = mask & visible_past(queries, keys, q.device) if causal else mask
            visible = visible.expand(*visible.shape[:-2], queries, keys)
            return {"atten_mask": ~visible, "sparse_mode": _MASK_AS_GIVEN}
        if not causal or queries == 1:
            return {}
        if q.device not in self._triangles:
            whole = torch.ones(_COMPRESSED_MASK, _COMPRESSED_MASK, dtype=torch.bool, device=q.device)
            self._triangles[q.device] = whole.triu(1)
        return {"atten_mask": self._triangles[q.device], "sparse_mode": _CAUSAL_AT_END}


def _attention(npu: ModuleType) -> Callable[..., Tensor]:
    """npu_fusion_attention with its own backward; shared key heads are the kernel's business.

    Source: hiascend.com, PyTorch 6.0 to 7.0 API list, torch_npu.npu_fusion_attention.
    """
    masks = _Masks()

    def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
        keywords = masks.arguments(q, k, causal, mask)
        return npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=scale, keep_prob=1.0, **keywords)[0]

    return attention


def _attention_with_lse(npu: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same kernel: results 1 and 2 are the rows' maxima and sums of exponentials.

    What it gives for a row without visible keys is not documented, so such rows are set here.
    Source: as `_attention`; the pair's meaning from MindSpeed docs/ops/npu_ring_attention_update.md.
    """
    masks = _Masks()

    @torch.no_grad()
    def attention_with_lse(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keywords = masks.arguments(q, k, causal, mask)
        out, peak, total = npu.npu_fusion_attention(
            q, k, v, q.shape[1], "BNSD", scale=scale, keep_prob=1.0, **keywords
        )[:3]
        lse = peak[..., 0] + total[..., 0].log()
        if mask is None:
            return out, lse
        blind = keywords["atten_mask"].all(-1).expand(lse.shape)
        return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)

    return attention_with_lse


def _attention_backward(npu: ModuleType) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """npu_fusion_attention_grad, which needs maxima and sums only as exp(score - maximum) / sum: the log-sum-exp with
    sums of one says the same.

    Source: the wheel's schema; equations in msprobe bench_functions/npu_fusion_attention.py.
    """
    masks = _Masks()

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
        peak = lse.masked_fill(lse == -torch.inf, 0.0)[..., None].expand(*lse.shape, _LSE_COPIES).contiguous()
        grad_q, grad_k, grad_v = npu.npu_fusion_attention_grad(
            q,
            k,
            v,
            grad_out,
            q.shape[1],
            "BNSD",
            softmax_max=peak,
            softmax_sum=torch.ones_like(peak),
            attention_in=out,
            scale_value=scale,
            keep_prob=1.0,
            **masks.arguments(q, k, causal, mask),
        )[:3]
        return grad_q, grad_k, grad_v

    return attention_backward


def _rms_norm(npu: ModuleType) -> Callable[..., Tensor]:
    """npu_rms_norm in fp32: x and weight must have one dtype, and the weight keeps its fp32.

    Source: hiascend.com, PyTorch 7.0 API list, torch_npu.npu_rms_norm.
    """

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return npu.npu_rms_norm(x.float(), weight.float(), eps)[0].to(x.dtype)

    return rms_norm


def _rotate(npu: ModuleType) -> Callable[..., Tensor]:
    """npu_rotary_mul in fp32: x * cos + (-second half, first half) * sin, tables [1, s, 1, d] of whole heads.

    Source: hiascend.com, PyTorch 7.0 API list, torch_npu.npu_rotary_mul (mode half, layout BSND).
    """

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        whole_cos, whole_sin = (torch.cat((half, half), dim=-1)[None, :, None] for half in (cos, sin))
        return npu.npu_rotary_mul(x.float(), whole_cos, whole_sin).to(x.dtype)

    return rotate


def _swiglu(npu: ModuleType) -> Callable[..., Tensor]:
    """npu_swiglu of gate and up side by side. Source: the wheel's schema; MindSpeed docs/features/swiglu.md."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)

    return swiglu


class _GroupedMatmul(torch.autograd.Function):
    """Rows split by cumulative counts (group_type 0); weight gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, npu: ModuleType, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.npu = npu
        ctx.save_for_backward(x, weights, ends)
        return _grouped_rows(npu, x, weights, ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        x, weights, ends = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_x = _grouped_rows(ctx.npu, grad, weights.mT, ends) if ctx.needs_input_grad[1] else None
        grad_weights = None
        if ctx.needs_input_grad[2]:
            sums = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
            ctx.npu.npu_grouped_matmul_add_(sums, x, grad, ends)
            grad_weights = sums.to(weights.dtype)
        return None, grad_x, grad_weights, None


def _grouped_rows(npu: ModuleType, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return npu.npu_grouped_matmul([x], [weights], group_list=ends, split_item=3, group_type=0, group_list_type=0)[0]


def _grouped_matmul(npu: ModuleType) -> Callable[..., Tensor]:
    """npu_grouped_matmul and npu_grouped_matmul_add_, which takes 16-bit inputs only: fp32 stays with the reference.

    Source: hiascend.com, PyTorch 7.0 API list, npu_grouped_matmul; CANN aclnnGroupedMatmulAdd (cumulative lists).
    """

    def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return plain_experts.grouped_matmul(x, weights, counts)
        return _GroupedMatmul.apply(npu, x, weights, counts.to(x.device).cumsum(0))

    return grouped_matmul


def _cross_entropy(npu: ModuleType) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """npu_cross_entropy_loss: results 0 and 1 are losses and log-probabilities.

    Source: Ascend op-plugin docs/context/torch_npu-npu_cross_entropy_loss.md.
    """

    @torch.no_grad()
    def cross_entropy(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        losses, log_probabilities = npu.npu_cross_entropy_loss(logits.float(), target, reduction="none")[:2]
        return losses, plain.gradient_of_log_softmax(log_probabilities, target) if with_gradient else None

    return cross_entropy


OVERRIDES: Mapping[str, Override] = {
    "attention": Override("torch_npu", ("npu_fusion_attention",), _attention),
    "attention_with_lse": Override("torch_npu", ("npu_fusion_attention",), _attention_with_lse),
    "attention_backward": Override("torch_npu", ("npu_fusion_attention_grad",), _attention_backward),
    "rms_norm": Override("torch_npu", ("npu_rms_norm",), _rms_norm),
    "rotate": Override("torch_npu", ("npu_rotary_mul",), _rotate),
    "swiglu": Override("torch_npu", ("npu_swiglu",), _swiglu),
    "grouped_matmul": Override("torch_npu", ("npu_grouped_matmul", "npu_grouped_matmul_add_"), _grouped_matmul),
    "cross_entropy": Override("torch_npu", ("npu_cross_entropy_loss",), _cross_entropy),
    "adamw": FUSED_ADAMW,  # torch_npu 2.13.0 registers aten::_fused_adamw_ for its device
}
