"""What a mixture of experts is made of, in plain PyTorch. Shapes: t tokens, k experts a token, n rows in the
order of experts, h hidden, e experts, f inner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def rows_of_each(counts: Tensor, rows: int) -> list[int]:
    """The counts as numbers. A dry run's have none: `rows` are then shared out as evenly as can be."""
    if isinstance(counts, FakeTensor) or counts.device.type == "meta":
        each, left = divmod(rows, len(counts))
        return [each + (number < left) for number in range(len(counts))]
    found: list[int] = counts.tolist()
    return found


class _GroupedMatmul(torch.autograd.Function):
    """One product an expert, written straight into its rows of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.sizes = rows_of_each(counts, len(x))
        out = x.new_empty(x.shape[0], weights.shape[2])
        for rows, weight, result in zip(x.split(ctx.sizes), weights, out.split(ctx.sizes), strict=True):
            torch.mm(rows, weight, out=result)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, size in enumerate(ctx.sizes):
            part = slice(start, start + size)
            if grad_x is not None:
                torch.mm(grad[part], weights[expert].t(), out=grad_x[part])
            if grad_weights is not None:
                torch.mm(x[part].t(), grad[part], out=grad_weights[expert])
            start += size
        return grad_x, grad_weights, None


def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """See contract.GroupedMatmul."""
    return _GroupedMatmul.apply(x, weights, counts)


class Gather(torch.autograd.Function):
    """rows [t, h] -> [n, h], the row of each choice in the order of experts. Backward adds up each token's k."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.tokens = len(rows)
        return rows.index_select(0, order // (len(place) // len(rows)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        order, place = ctx.saved_tensors
        (grad,) = grad_outputs
        return _of_choices(grad, order, place).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Combine(torch.autograd.Function):
    """See contract.Combine."""

    @staticmethod
    def forward(ctx: Any, answers: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(answers, weights, order)
        chosen = _of_choices(answers, order, place).view(*weights.shape, -1)
        total = chosen[:, 0].to(weights.dtype) * weights[:, :1]
        for number in range(1, weights.shape[1]):
            total.addcmul_(chosen[:, number].to(weights.dtype), weights[:, number : number + 1])
        return total.to(answers.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        answers, weights, order = ctx.saved_tensors
        grad, k = grad_outputs[0], weights.shape[1]
        rows = grad.index_select(0, order // k)  # of each answer, in the order of experts
        by_answer = (rows * answers).sum(-1, dtype=weights.dtype)
        grad_weights = weights.new_zeros(weights.numel()).index_copy_(0, order, by_answer).view_as(weights)
        grad_answers = rows.mul_(weights.flatten()[order, None].to(rows.dtype))
        return grad_answers, grad_weights, None, None


def _of_choices(rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows in the order of experts -> [t * k, h] in the order of choices, zero for those left out."""
    if len(order) == len(place):
        return rows.index_select(0, place)
    return rows.new_zeros(len(place), rows.shape[1]).index_copy_(0, order, rows)


def combine(answers: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """See contract.Combine."""
    out: Tensor = _Combine.apply(answers, weights, order, place)
    return out
