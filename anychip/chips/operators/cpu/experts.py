"""Experts' MLPs on bf16 tokens by csrc/experts.cpp: without gathered rows, casts of fp32 masters or a SwiGLU in memory;
gradients of the masters are fp32."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain, plain_experts
from anychip.chips.operators.cpu.library import RUNS_HERE, load

_LANES = 16


def expert_mlp(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """See contract.ExpertMlp."""
    kinds = {weight.dtype for weight in (gate, up, down)}
    fits = x.dtype == torch.bfloat16 and kinds in ({torch.bfloat16}, {torch.float32})
    if not (RUNS_HERE and fits and not any(size % _LANES for size in gate.shape[1:])):
        return plain.expert_mlp(x, order, place, counts, gate, up, down)
    out: Tensor = _ExpertMlp.apply(x, order, place, counts, gate, up, down)
    return out


class _ExpertMlp(torch.autograd.Function):
    """Keeps what gate and up gave; SwiGLU is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, place: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        x, gate, up, down, counts = (tensor.contiguous() for tensor in (x, gate, up, down, counts))
        tokens = order // (len(place) // max(len(x), 1))
        kept, inner = x.new_empty(2, len(order), gate.shape[1]), x.new_empty(len(order), gate.shape[1])
        out = x.new_empty(len(order), x.shape[1])
        ctx.sizes, ctx.fp32 = _sizes(x, order, gate), ctypes.c_int64(gate.dtype == torch.float32)
        given = _addresses(x, tokens, counts, gate, up, down, *kept.unbind(0), inner, out)
        load().experts_forward(*given, ctypes.byref(ctx.sizes), ctx.fp32)
        ctx.save_for_backward(x, tokens, place, counts, gate, up, down, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, tokens, place, counts, gate, up, down, kept = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_gates, grad_ups, inner = torch.empty(3, *kept.shape[1:], dtype=x.dtype).unbind(0)
        grad_rows = torch.empty_like(grad)
        grad_weights = [
            torch.empty_like(weight) if wanted else None
            for weight, wanted in zip((gate, up, down), ctx.needs_input_grad[4:], strict=True)
        ]
        read = _addresses(grad, x, tokens, counts, gate, up, down, *kept.unbind(0))
        written = _addresses(grad_gates, grad_ups, inner, grad_rows, *grad_weights)
        load().experts_backward(*read, *written, ctypes.byref(ctx.sizes), ctx.fp32)
        grad_x = _add_up(grad_rows, None, place, len(x)) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *grad_weights


def combine(answers: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """See contract.Combine."""
    fits = answers.dtype == torch.bfloat16 and weights.dtype == torch.float32 and answers.shape[1] % _LANES == 0
    if not (RUNS_HERE and fits):
        return plain_experts.combine(answers, weights, order, place)
    out: Tensor = _Combine.apply(answers, weights, place)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, weights: Tensor, place: Tensor) -> Tensor:
        answers, weights = answers.contiguous(), weights.contiguous()
        ctx.save_for_backward(answers, weights, place)
        return _add_up(answers, weights, place, len(weights))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        answers, weights, place = ctx.saved_tensors
        grad_answers, grad_weights = torch.empty_like(answers), torch.empty_like(weights)
        given = _addresses(grad_outputs[0].contiguous(), answers, weights, place, grad_answers, grad_weights)
        load().combine_backward(*given, *_counts(*weights.shape, *answers.shape))
        return grad_answers, grad_weights, None


def _add_up(rows: Tensor, weights: Tensor | None, place: Tensor, tokens: int) -> Tensor:
    """The (weighed) rows of each token, [tokens, h]."""
    out = rows.new_empty(tokens, rows.shape[1])
    k = len(place) // max(tokens, 1)
    load().combine_forward(*_addresses(rows, weights, place, out), *_counts(tokens, k, *rows.shape))
    return out


class _Sizes(ctypes.Structure):
    """csrc/experts.cpp, struct Sizes."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tokens", "rows", "experts", "hidden", "inner"))


def _sizes(x: Tensor, order: Tensor, gate: Tensor) -> _Sizes:
    return _Sizes(len(x), len(order), len(gate), x.shape[1], gate.shape[1])


def _addresses(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _counts(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]
