"""Losses that keep experts evenly used, and the numbers that say whether they are.

They act on the router alone and are known where it runs, so they enter backward there: no layer has to hand them on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def count_load(experts: Tensor, count: int) -> Tensor:
    """Choices [t, k] -> tokens of each expert, [count] int64."""
    flat = experts.flatten()
    return flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))


def balance_loss(scores: Tensor, experts: Tensor, sequences: int) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (arXiv 2412.19437, eq. 17-20), in which f_i is expert i's share of the
    sequence's choices times the number of experts, and P_i its mean share of the scores. scores [t, e], experts [t, k]
    of whole sequences, one after the other."""
    count = scores.shape[1]
    by_sequence = experts.view(sequences, -1)
    chosen = scores.new_zeros(sequences, count).scatter_add_(1, by_sequence, scores.new_ones(()).expand_as(by_sequence))
    share = scores / scores.sum(-1, keepdim=True)
    return (chosen * (count / by_sequence.shape[1]) * share.view(sequences, -1, count).mean(1)).sum()


def z_loss(logits: Tensor, sequences: int) -> Tensor:
    """Sum over sequences of the mean of logsumexp(logits)^2 over their tokens (arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().sum() / (len(logits) // sequences)


class _AddLoss(torch.autograd.Function):
    """Passes the weights on. Backward: the losses count `scale`, and the bias "gets" its experts' load."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, loss: Tensor | None, scale: float, bias: Tensor | None, counts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(loss, bias, counts)
        ctx.scale = scale
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        loss, bias, counts = ctx.saved_tensors
        of_loss = None if loss is None else torch.full_like(loss, ctx.scale)
        return grad_outputs[0], of_loss, None, None if bias is None else counts.to(bias.dtype), None


def add_loss(weights: Tensor, loss: Tensor | None, scale: float, bias: Tensor | None, counts: Tensor) -> Tensor:
    """The routing weights [t, k]; see `Router` for what backward does with loss, bias and counts [e]."""
    out: Tensor = _AddLoss.apply(weights, loss, scale, bias, counts)
    return out
