"""Attention by PyTorch's own kernels: the differentiable whole, and on a CPU its two halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.operators import blocked_attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """See contract.Attention. PyTorch picks its fastest kernel; a mask is only made where it cannot do without."""
    mask, causal = _kernel_arguments(q, k, causal, mask)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


@torch.no_grad()
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See contract.AttentionWithLse. For a query that sees no key PyTorch's CPU kernel gives log-sum-exp 0."""
    if q.device.type != "cpu":
        return blocked_attention.attention_with_lse(q, k, v, scale=scale, causal=causal, mask=mask)
    mask, causal = _kernel_arguments(q, k, causal, mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_added(mask, q), scale=scale
    )
    return out, lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)


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
    """See contract.AttentionBackward."""
    if q.device.type != "cpu":
        return blocked_attention.attention_backward(grad_out, q, k, v, out, lse, scale=scale, causal=causal, mask=mask)
    mask, causal = _kernel_arguments(q, k, causal, mask)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # hidden scores of -inf then give probabilities of 0, not NaN
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=_added(mask, q), scale=scale
    )


def visible_past(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query sees every key, each one before it one key fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _kernel_arguments(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """PyTorch's kernels take a mask or `causal`, and align causal attention at the first key."""
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == 1:  # one query is the last one and sees everything
        return mask, False
    if mask is None and queries == keys:
        return None, True
    past = visible_past(queries, keys, q.device)
    return past if mask is None else mask & past, False


def _added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as numbers to add to scores."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
