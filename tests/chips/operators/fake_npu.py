"""A stand-in for `torch_npu`: its functions compute in plain torch, in fp64, by the vendor's conventions.

Attention masks hide where they are 1, a causal mask is a triangle of 2048, row maxima and sums come eight times,
cos and sin are of whole heads, gate and up lie side by side, group lists are cumulative.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fake_npu(**replacements: Any) -> ModuleType:
    """The module; a replacement of None leaves the function out."""
    module = ModuleType("torch_npu")
    for function in (
        npu_fusion_attention,
        npu_fusion_attention_grad,
        npu_rms_norm,
        npu_rotary_mul,
        npu_swiglu,
        npu_grouped_matmul,
        npu_grouped_matmul_add_,
        npu_cross_entropy_loss,
    ):
        setattr(module, function.__name__, function)
    for name, replacement in replacements.items():
        if replacement is None:
            delattr(module, name)
        else:
            setattr(module, name, replacement)
    return module


def _hidden(queries: int, keys: int, atten_mask: Tensor | None, sparse_mode: int) -> Tensor | None:
    if sparse_mode == 3:
        assert atten_mask is not None and atten_mask.shape == (2048, 2048)
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        return torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    assert sparse_mode in (0, 1)
    if atten_mask is not None:
        assert sparse_mode == 1 and atten_mask.dtype == torch.bool
        assert atten_mask.shape[-2:] == (queries, keys) and atten_mask.dim() in (2, 4)
    return atten_mask


def _scores(query: Tensor, key: Tensor, head_num: int, layout: str, scale: float, hidden: Tensor | None) -> Tensor:
    assert layout == "BNSD" and query.shape[1] == head_num
    repeated = key.double().repeat_interleave(head_num // key.shape[1], dim=1)
    scores = query.double() @ repeated.mT * scale
    return scores if hidden is None else scores.masked_fill(hidden, -1e30)  # finite: blind rows see everything


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Any, ...]:
    assert keep_prob == 1.0
    hidden = _hidden(query.shape[2], key.shape[2], atten_mask, sparse_mode)
    scores = _scores(query, key, head_num, input_layout, scale, hidden)
    peak = scores.amax(-1, keepdim=True)
    total = (scores - peak).exp().sum(-1, keepdim=True)
    values = value.double().repeat_interleave(head_num // value.shape[1], dim=1)
    out = ((scores - peak).exp() / total @ values).to(query.dtype)
    eight = (*query.shape[:3], 8)
    empty = torch.empty(0)
    return out, peak.float().expand(eight), total.float().expand(eight), empty, 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Tensor, ...]:
    assert softmax_max.shape == softmax_sum.shape == (*query.shape[:3], 8)
    assert softmax_max.dtype == softmax_sum.dtype == torch.float32 and keep_prob == 1.0
    hidden = _hidden(query.shape[2], key.shape[2], atten_mask, sparse_mode)
    scores = _scores(query, key, head_num, input_layout, scale_value, hidden)
    share = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    shared = head_num // key.shape[1]
    keys, values = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
    dy = dy.double()
    inner = share * (dy @ values.mT - (dy * attention_in).sum(-1, keepdim=True)) * scale_value
    grad_key, grad_value = (g.unflatten(1, (-1, shared)).sum(2) for g in (inner.mT @ query.double(), share.mT @ dy))
    grads = (inner @ keys).to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
    return *grads, torch.empty(0), torch.empty(0)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype
    rstd = torch.rsqrt(input.square().mean(-1, keepdim=True) + epsilon)
    return input * rstd * gamma, rstd


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    assert input.dim() == 4 and rotary_mode == "half" and input.dtype == r1.dtype == r2.dtype
    assert r1.shape == r2.shape == (1, input.shape[1], 1, input.shape[3])
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), dim=-1) * r2


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> list[Tensor]:
    assert len(x) == len(weight) == 1 and (split_item, group_type, group_list_type) == (3, 0, 0)
    assert group_list.dtype == torch.int64
    rows = x[0].tensor_split(group_list[:-1].tolist())
    return [torch.cat([part @ w for part, w in zip(rows, weight[0], strict=True)])]


def npu_grouped_matmul_add_(
    input: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
) -> Tensor:
    assert transpose_x and not transpose_weight and group_type == 2
    assert input.dtype == torch.float32 and x.dtype == weight.dtype != torch.float32
    cuts = group_list[:-1].tolist()
    for total, rows, grads in zip(input, x.tensor_split(cuts), weight.tensor_split(cuts), strict=True):
        total += rows.float().t() @ grads.float()
    return input


def npu_cross_entropy_loss(input: Tensor, target: Tensor, *, reduction: str = "mean") -> tuple[Tensor, ...]:
    assert reduction == "none" and target.dtype == torch.int64
    log_prob = input.log_softmax(-1)
    return F.nll_loss(log_prob, target, reduction="none"), log_prob, torch.empty(0), torch.empty(0)
