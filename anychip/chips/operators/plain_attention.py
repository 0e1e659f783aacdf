"""Attention in plain PyTorch: the differentiable whole, and the two halves that attention in blocks is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # queries whose scores exist at one time


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """See contract.Attention. PyTorch picks its fastest kernel; a mask is only made where it cannot do without."""
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and queries > 1  # one query is the last one and sees everything
    if causal and (mask is not None or queries < keys):
        past = visible_past(queries, keys, q.device)
        mask, causal = past if mask is None else mask & past, False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See contract.AttentionWithLse."""
    with torch.no_grad():
        if _cpu_kernel_fits(q, k, causal, mask):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=_wide_dtype(q), device=q.device)
        keys, values = _wide_heads(k, q.shape[1]), _wide_heads(v, q.shape[1])
        for start in range(0, q.shape[2], _ROWS):
            rows = slice(start, start + _ROWS)
            scores = _scores(q, keys, rows, scale, causal, mask)
            lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
            probabilities = _probabilities(scores, lse[:, :, rows])
            out[:, :, rows] = (probabilities @ values).to(q.dtype)
        return out, lse


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
    """See contract.AttentionBackward; the formulas are those of arXiv 2205.14135, appendix B.2."""
    with torch.no_grad():
        if _cpu_kernel_fits(q, k, causal, mask):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
            )
        heads, groups = q.shape[1], k.shape[1]
        keys, values = _wide_heads(k, heads), _wide_heads(v, heads)
        grad_q, grad_keys, grad_values = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        for start in range(0, q.shape[2], _ROWS):
            rows = slice(start, start + _ROWS)
            grad = grad_out[:, :, rows].to(keys.dtype)
            probabilities = _probabilities(_scores(q, keys, rows, scale, causal, mask), lse[:, :, rows])
            grad_values += probabilities.mT @ grad
            correction = (grad * out[:, :, rows]).sum(-1, keepdim=True)
            grad_scores = probabilities * (grad @ values.mT - correction) * scale
            grad_q[:, :, rows] = (grad_scores @ keys).to(q.dtype)
            grad_keys += grad_scores.mT @ q[:, :, rows].to(keys.dtype)
        return grad_q, _summed(grad_keys, groups).to(k.dtype), _summed(grad_values, groups).to(v.dtype)


def visible_past(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: the last query sees every key, each one before it one key fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _cpu_kernel_fits(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """PyTorch's CPU kernel shares key heads by itself, but aligns causal attention at the first key: there lengths
    must be equal."""
    return q.device.type == "cpu" and mask is None and (not causal or q.shape[2] == k.shape[2])


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide_heads(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the query heads that share them, in fp32 or wider: [b, kv, t, d] -> [b, heads, t, d]."""
    return x.to(_wide_dtype(x)).repeat_interleave(heads // x.shape[1], dim=1)


def _summed(x: Tensor, groups: int) -> Tensor:
    """The transpose of repeating heads: [b, heads, t, d] -> [b, groups, t, d]."""
    return x.unflatten(1, (groups, -1)).sum(2)


def _scores(q: Tensor, keys: Tensor, rows: slice, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """Scaled scores of some rows, -inf where a key is hidden: [b, n, rows, t]."""
    scores = q[:, :, rows].to(keys.dtype) @ keys.mT * scale
    if causal:
        past = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(keys.shape[2] - q.shape[2] + rows.start)
        scores = scores.masked_fill(~past, -torch.inf)
    if mask is not None:
        part = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
        scores = scores.masked_fill(~part, -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for a query that sees no key."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
