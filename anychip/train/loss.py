"""Cross-entropy of the output head, without the logits of the whole batch.

Logits of `chunk_tokens` tokens exist at a time. Each chunk's gradient is formed while its probabilities are still in
cache, so backward has nothing to recompute (the idea of arXiv 2410.10989, section 3). With a process group each
process holds some rows of the vocabulary; three numbers a token travel (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        everything = kept.numel() == labels.numel()
        rows, targets = (hidden, labels) if everything else (hidden[kept], labels[kept])
        products = weight.to(hidden.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_rows = torch.empty_like(rows) if needs_grad else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        total = torch.zeros(
            (), dtype=torch.float64 if hidden.device.type == "cpu" else torch.float32, device=hidden.device
        )
        for start in range(0, rows.shape[0], chunk_tokens):
            part = rows[start : start + chunk_tokens]
            target = targets[start : start + chunk_tokens, None]
            logits = (part @ products.t()).float()
            if group is None:
                log_probabilities = torch.log_softmax(logits, dim=-1)
                total -= log_probabilities.gather(1, target).sum()
                hit: Tensor | float = -1.0
            else:
                log_probabilities, hit, target, at_target = _shared_log_softmax(logits, target, group)
                total -= at_target.sum()
            if grad_rows is not None and grad_weight is not None:
                grad_logits = log_probabilities.exp_()
                ones = hit if isinstance(hit, Tensor) else grad_logits.new_full((), hit).expand_as(target)
                grad_logits.scatter_add_(1, target, ones)
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, products, out=grad_rows[start : start + chunk_tokens])
                if grad_weight.dtype == grad_logits.dtype:
                    grad_weight.addmm_(grad_logits.t(), part)
                else:
                    grad_weight += grad_logits.t() @ part
        if grad_rows is not None and not everything:
            grad_rows = torch.zeros_like(hidden).index_copy_(0, kept, grad_rows)
        ctx.save_for_backward(grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Pipeline schedules may ask twice, once for each input: what was saved stays as it was."""
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _shared_log_softmax(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of this process's rows of the vocabulary, from maxima and sums over all of them.

    Returns them [tokens, rows], -1 where the target's row is here and else 0 [tokens, 1], the target's row here (0 if
    elsewhere) [tokens, 1], and the target's log-probability [tokens, 1].
    """
    peak = logits.amax(1, keepdim=True)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    row = target - group.rank() * logits.shape[1]
    here = (row >= 0) & (row < logits.shape[1])
    row = row.clamp(0, logits.shape[1] - 1)
    logits -= peak
    both = torch.cat((logits.exp().sum(1, keepdim=True), logits.gather(1, row) * here), dim=1)
    dist.all_reduce(both, op=dist.ReduceOp.SUM, group=group)
    normalizer = both[:, :1].log()
    return logits.sub_(normalizer), -here.to(logits.dtype), row, both[:, 1:] - normalizer


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum (not mean) of the cross-entropy in nats over tokens whose label is not -100; a scalar fp32.

    hidden [tokens, hidden_size] in the compute dtype, weight [vocab_size, hidden_size] fp32, labels [tokens] int64.
    Softmax and the sum are in fp32 or wider. Differentiable in hidden and weight.

    With a `group`, weight holds this process's equal share of the vocabulary, in the order of ranks; every process gets
    the loss, and a gradient of hidden that is its share of a sum.
    """
    return _HeadCrossEntropy.apply(hidden, weight, labels, chunk_tokens, group)
