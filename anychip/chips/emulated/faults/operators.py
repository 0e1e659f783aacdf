"""Wrong versions of operators, each made from the right one. All keep the contract's shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.emulated.faults.catalogue import OPERATORS, Fault, active_faults
from anychip.chips.operators.override import Override
from anychip.chips.operators.plain import reference, wide

_BLOCK = 128  # behind it lie what a small trial does not see
Operator = Callable[..., Any]


def faulty_overrides() -> dict[str, Override]:
    """An override for each operator that a fault is on for; none without faults."""
    overrides = {}
    for fault in active_faults():
        if fault.name in OPERATORS:
            overrides[fault.target] = Override(__name__, (), partial(_build, fault))
    return overrides


def _build(fault: Fault, module: ModuleType) -> Operator:
    right, wrong = getattr(reference, fault.target), _WRONG[fault.name]

    def operator(*args: Any, **keywords: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        return (wrong if fault.applies(first.dtype) else right)(*args, **keywords)

    return operator


class _Backward(torch.autograd.Function):
    """The same tensor forward; backward its gradient is changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad_outputs[0]), None


def _changed(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return _Backward.apply(x, change)


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


def _without_far_keys(gradient: Tensor) -> Tensor:
    return torch.cat((gradient[:, :, :_BLOCK], torch.zeros_like(gradient[:, :, _BLOCK:])), dim=2)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, past: int = 0) -> Tensor:
    """[b, n, s, t] in fp32 or wider; causal attention sees `past` keys more than it should."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = wide(q) @ wide(keys).mT * scale
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(
            k.shape[2] - q.shape[2] + past
        )
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _mixed(scores: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    return (scores.softmax(-1) @ wide(v.repeat_interleave(scores.shape[1] // v.shape[1], dim=1))).to(dtype)


def _attention_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    return _mixed(_scores(q, k, scale, causal, mask, past=1), v, q.dtype)


def _attention_heads(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    copies = q.shape[1] // k.shape[1]
    return reference.attention(q, k.repeat(1, copies, 1, 1), v.repeat(1, copies, 1, 1), **keywords)


def _attention_long(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    scores = _scores(q, k, scale, causal, mask)
    far = torch.arange(k.shape[2], device=q.device) >= _BLOCK
    late = (torch.arange(q.shape[2], device=q.device) >= q.shape[2] - 32) & (q.shape[2] > _BLOCK)
    return _mixed(scores.masked_fill(late[:, None] & far, -torch.inf), v, q.dtype)


def _attention_low_accumulation(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> Tensor:
    shares = _scores(q, k, scale, causal, mask).softmax(-1)
    values = wide(v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
    total = torch.zeros(*shares.shape[:-1], v.shape[3], dtype=values.dtype, device=q.device)
    for share, value in zip(shares.split(1, -1), values.split(1, -2), strict=True):
        total = (total + share @ value).bfloat16().to(values.dtype)
    return total.to(q.dtype)


def _attention_unrepeatable(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    return unrepeatable(reference.attention(q, k, v, **keywords))


def unrepeatable(x: Tensor) -> Tensor:
    """A quarter of the elements off by one in the last place, others each time."""
    noise = (torch.rand(x.shape, device=x.device) < 0.25).to(x.dtype)
    return x * (1 + noise * torch.finfo(x.dtype).eps)


def _lse_base(*args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention_with_lse(*args, **keywords)
    return out, lse * 1.4426950408889634


def _backward_grad_k(*args: Any, scale: float, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = reference.attention_backward(*args, scale=scale, **keywords)
    return grad_q, grad_k / scale, grad_v


def _norm_grad_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inner = wide(x)
    rstd = inner.square().mean(-1, keepdim=True).add(eps).rsqrt().detach()
    return (inner * rstd * weight).to(x.dtype)


def _norm_grad_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inner = wide(x)
    rstd = inner.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return _RowScale.apply(inner * rstd, weight).to(x.dtype)


class _RowScale(torch.autograd.Function):
    """x * weight whose gradient of the weight is added up row by row in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        total = torch.zeros_like(weight)
        for row in (grad_outputs[0] * x).flatten(0, -2):
            total = (total + row).bfloat16().to(weight.dtype)
        return grad_outputs[0] * weight, total


def _norm_low_precision(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inner = wide(x)
    square = inner.square().mean(-1, keepdim=True)
    return (inner * (square + (square.bfloat16() - square).detach() + eps).rsqrt() * weight).to(x.dtype)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = wide(x[..., ::2]), wide(x[..., 1::2])
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class _TurnedTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = cos, sin
        return reference.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return reference.rotate(grad_outputs[0], *ctx.tables), None, None


class _SwigluOfSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return grad_outputs[0] * up * gate.sigmoid(), grad_outputs[0] * F.silu(gate)


def _last_expert(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    busy = counts.nonzero().flatten()
    order = torch.arange(len(weights), device=weights.device)
    order[busy[-1]] = 0
    return reference.grouped_matmul(x, weights[order], counts)


def _no_maximum(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    scores = wide(logits)
    total = scores.exp().sum(-1, keepdim=True)
    losses = (total.log() - scores.gather(1, target[:, None])).squeeze(1)
    gradient = (scores.exp() / total).scatter_add(1, target[:, None], -torch.ones_like(scores[:, :1]))
    return losses, gradient if with_gradient else None


def _no_one(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    losses, _ = reference.cross_entropy(logits.clone(), target, with_gradient=False)
    return losses, wide(logits).softmax(-1) if with_gradient else None


def _adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    corrected: bool,
    coupled: bool,
) -> None:
    for p, gradient, m, v, step in zip(parameters, gradients, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        g = gradient + weight_decay * p if coupled else gradient
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        of_m, of_v = (1 - beta ** float(step) if corrected else 1.0 for beta in betas)
        if not coupled:
            p.mul_(1 - lr * weight_decay)
        p.addcdiv_(m / of_m, (v / of_v).sqrt() + eps, value=-lr)


_WRONG: Mapping[str, Operator] = {
    "attention.scale": lambda q, k, v, *, scale, **kw: reference.attention(q, k, v, scale=1.03 * scale, **kw),
    "attention.grad_q": lambda q, k, v, **kw: reference.attention(_changed(q, _scaled(0.5)), k, v, **kw),
    "attention.grad_k": lambda q, k, v, **kw: reference.attention(q, _changed(k, _without_far_keys), v, **kw),
    "attention.grad_v": lambda q, k, v, **kw: reference.attention(q, k, _changed(v, _scaled(1 + 2**-6)), **kw),
    "attention.causal": _attention_causal,
    "attention.mask": lambda q, k, v, *, mask, **kw: reference.attention(q, k, v, mask=None, **kw),
    "attention.heads": _attention_heads,
    "attention.long": _attention_long,
    "attention.low_accumulation": _attention_low_accumulation,
    "attention.unrepeatable": _attention_unrepeatable,
    "attention_with_lse.base": _lse_base,
    "attention_backward.grad_k": _backward_grad_k,
    "rms_norm.eps": lambda x, weight, eps: reference.rms_norm(x, weight, 0.0),
    "rms_norm.grad_x": _norm_grad_x,
    "rms_norm.grad_weight": _norm_grad_weight,
    "rms_norm.low_precision": _norm_low_precision,
    "rotate.pairs": _rotate_pairs,
    "rotate.backward": lambda x, cos, sin: _TurnedTwice.apply(x, cos, sin),
    "swiglu.grad_gate": lambda gate, up: _SwigluOfSigmoid.apply(gate, up),
    "swiglu.grad_up": lambda gate, up: reference.swiglu(gate, _changed(up, _scaled(1 + 2**-6))),
    "swiglu.saturates": lambda gate, up: reference.swiglu(gate.clamp(max=8.0), up),
    "grouped_matmul.last_expert": _last_expert,
    "grouped_matmul.grad_weights": lambda x, weights, counts: reference.grouped_matmul(
        x, _changed(weights, _scaled(0.5)), counts
    ),
    "cross_entropy.overflow": _no_maximum,
    "cross_entropy.gradient": _no_one,
    "adamw.bias_correction": partial(_adamw, corrected=False, coupled=False),
    "adamw.coupled_decay": partial(_adamw, corrected=True, coupled=True),
}
