"""Cross-entropy of the output head, without the logits of the whole batch.

Logits of `chunk_tokens` tokens exist at a time. Each chunk's gradient is formed while its probabilities are still in
cache, so backward has nothing to recompute (the idea of arXiv 2410.10989, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        everything = kept.numel() == labels.numel()
        rows, targets = (hidden, labels) if everything else (hidden[kept], labels[kept])
        products = weight.to(hidden.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        total = torch.zeros(
            (), dtype=torch.float64 if hidden.device.type == "cpu" else torch.float32, device=hidden.device
        )
        for start in range(0, rows.shape[0], chunk_tokens):
            part = rows[start : start + chunk_tokens]
            target = targets[start : start + chunk_tokens, None]
            log_probabilities = torch.log_softmax((part @ products.t()).float(), dim=-1)
            total -= log_probabilities.gather(1, target).sum()
            if grad_rows is not None and grad_weight is not None:
                grad_logits = log_probabilities.exp_()
                grad_logits.scatter_add_(1, target, grad_logits.new_full((), -1.0).expand_as(target))
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, products, out=grad_rows[start : start + chunk_tokens])
                if grad_weight.dtype == grad_logits.dtype:
                    grad_weight.addmm_(grad_logits.t(), part)
                else:
                    grad_weight += grad_logits.t() @ part
        if grad_rows is not None and not everything:
            grad_rows = torch.zeros_like(hidden).index_copy_(0, kept, grad_rows)
        ctx.save_for_backward(grad_rows, grad_weight)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """Sum (not mean) of the cross-entropy in nats over tokens whose label is not -100; a scalar fp32.

    hidden [tokens, hidden_size] in the compute dtype, weight [vocab_size, hidden_size] fp32, labels [tokens] int64.
    Softmax and the sum are in fp32 or wider. Differentiable in hidden and weight, once.
    """
    return _HeadCrossEntropy.apply(hidden, weight, labels, chunk_tokens)
