"""Cross-entropy of the output head, without the logits of the whole batch: its sum, or each token's own.

Logits of `chunk_tokens` tokens exist at a time. Each chunk's gradient is formed while its probabilities are still in
cache, so backward has nothing to recompute (the idea of arXiv 2410.10989, section 3). With a process group each
process holds some rows of the vocabulary; three numbers a token travel (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.chips.operators import reference
from anychip.chips.operators.contract import CrossEntropy
from anychip.chips.operators.prepared import wide_product

IGNORE_INDEX = -100


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        kept: Tensor | None,
        group: dist.ProcessGroup | None,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
        products = weight.to(hidden.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_grad else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        widest = torch.float64 if hidden.device.type == "cpu" else torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=widest, device=hidden.device)
        for start in range(0, rows.shape[0], chunk_tokens):
            part = rows[start : start + chunk_tokens]
            target = targets[start : start + chunk_tokens]
            logits = part @ products.t()
            if group is None:
                losses, grad_logits = cross_entropy(logits, target, with_gradient=needs_grad)
            else:
                losses, grad_logits = _shared_cross_entropy(logits, target, group)
            total += losses.sum()
            if grad_rows is not None and grad_logits is not None:
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, products, out=grad_rows[start : start + chunk_tokens])
                if grad_weight is None:
                    continue
                if grad_weight.dtype == grad_logits.dtype:
                    grad_weight.addmm_(grad_logits.t(), part)
                else:
                    grad_weight += grad_logits.t() @ part
        if grad_rows is not None and kept is not None:
            grad_rows = torch.zeros_like(hidden).index_copy_(0, kept, grad_rows)
        ctx.save_for_backward(grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Pipeline schedules may ask twice, once for each input: what was saved stays as it was."""
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        scaled_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden * scale, scaled_weight, None, None, None, None, None


class _HeadTokenLosses(torch.autograd.Function):
    """How much each token's loss counts is known in backward only: each chunk's logits are made again there. They are
    in fp32, because log-probabilities of single tokens are compared with those of another pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_tokens, ctx.group, ctx.cross_entropy = chunk_tokens, group, cross_entropy
        head = wide_product(weight.to(hidden.dtype))
        losses = [
            _chunk(head(hidden[start : start + chunk_tokens]), labels[start : start + chunk_tokens], ctx, False)[0]
            for start in range(0, len(labels), chunk_tokens)
        ]
        return torch.cat(losses) if losses else hidden.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        products, (grad_losses,) = weight.to(hidden.dtype), grad_outputs
        head = wide_product(products)
        grad_hidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            _, grad_logits = _chunk(head(hidden[rows]), labels[rows], ctx, True)
            assert grad_logits is not None
            grad_logits = (grad_logits * grad_losses[rows, None]).to(hidden.dtype)
            torch.mm(grad_logits, products, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _chunk(logits: Tensor, target: Tensor, ctx: Any, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    if ctx.group is not None:
        return _shared_cross_entropy(logits, target, ctx.group)
    losses, gradient = ctx.cross_entropy(logits, target, with_gradient=with_gradient)
    return losses, gradient


def head_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    cross_entropy: CrossEntropy = reference.cross_entropy,
) -> Tensor:
    """The cross-entropy of each token in nats, [tokens] in fp32 or wider; every label is one. The rest as for
    `head_cross_entropy`; backward makes the logits a second time."""
    return _HeadTokenLosses.apply(hidden, weight, labels, chunk_tokens, group, cross_entropy)


def _shared_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Losses [tokens], the same on all processes, and softmax minus one-hot of this process's rows of the vocabulary
    [tokens, rows], from maxima and sums over all rows. fp32, or wider if the logits are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = logits.amax(1, keepdim=True)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    row = target[:, None] - group.rank() * logits.shape[1]
    here = ((row >= 0) & (row < logits.shape[1])).to(logits.dtype)
    row = row.clamp(0, logits.shape[1] - 1)
    shifted = logits - peak
    exponentials = shifted.exp()
    both = torch.cat((exponentials.sum(1, keepdim=True), shifted.gather(1, row) * here), dim=1)
    dist.all_reduce(both, op=dist.ReduceOp.SUM, group=group)
    total, at_target = both[:, :1], both[:, 1:]
    return (total.log() - at_target).squeeze(1), exponentials.div_(total).scatter_add_(1, row, -here)


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    *,
    all_labelled: bool = False,
    cross_entropy: CrossEntropy = reference.cross_entropy,
) -> Tensor:
    """Sum (not mean) of the cross-entropy in nats over tokens whose label is not -100; a scalar in fp32 or wider.

    hidden [tokens, hidden_size] in the compute dtype, weight [vocab_size, hidden_size] fp32, labels [tokens] int64.
    Softmax and the sum are in fp32 or wider. Differentiable in hidden and weight.

    With a `group`, weight holds this process's equal share of the vocabulary, in the order of ranks; every process gets
    the loss, and a gradient of hidden that is its share of a sum. `all_labelled` says that no label is -100, which
    spares looking. Where no gradient is wanted, logits are not rounded to the compute dtype.
    """
    kept = None if all_labelled else (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if kept is not None and kept.numel() == labels.numel():
        kept = None
    if not torch.is_grad_enabled():
        rows, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
        losses = head_token_losses(rows, weight, targets, chunk_tokens, group, cross_entropy)
        wide = torch.float64 if hidden.device.type == "cpu" else losses.dtype
        return losses.sum(dtype=wide).to(torch.promote_types(hidden.dtype, torch.float32))
    return _HeadCrossEntropy.apply(hidden, weight, labels, chunk_tokens, kept, group, cross_entropy)
