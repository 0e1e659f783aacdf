"""The two halves of attention in blocks, in plain PyTorch: for every device without a kernel of its own.

Scores of 512 queries exist at a time; products and softmax are in fp32, or in fp64 when the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512


@torch.no_grad()
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See contract.AttentionWithLse."""
    out = torch.empty_like(q)
    keys, values = _wide_heads(k, q.shape[1]), _wide_heads(v, q.shape[1])
    lse = torch.empty(q.shape[:3], dtype=keys.dtype, device=q.device)
    for start in range(0, q.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = _scores(q, keys, rows, scale, causal, mask)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        out[:, :, rows] = (_probabilities(scores, lse[:, :, rows]) @ values).to(q.dtype)
    return out, lse


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
    """See contract.AttentionBackward; the formulas are those of arXiv 2205.14135, appendix B.2."""
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


def _wide_heads(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the query heads that share them, in fp32 or wider: [b, kv, t, d] -> [b, heads, t, d]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(heads // x.shape[1], dim=1)


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
        part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        scores = scores.masked_fill(~part, -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for a query that sees no key."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
