"""Attention over keys that are spread over processes, in two ways that give the same numbers.

`ring` (arXiv 2310.01889): keys and values travel around the ring while each process works on those it has; partial
results are merged by their log-sum-exp. At no time does a process hold more than its own keys, those at work and those
arriving. `all_gather` (arXiv 2407.21783, section 3.3.2): every process gets all keys and values first; two products of
attention instead of one a process, at the price of memory for all keys of one layer at a time.

Shapes: b batch, n query heads, k key heads, s tokens of this process, d head_dim. Only send, receive, all-gather and
sums are asked of a library. Gradients are added up in fp32, or in fp64 when the inputs are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.chips.operators import Operators
from anychip.parallel.collectives import gather, scatter_sum
from anychip.parallel.context.blocks import Block, Plan
from anychip.parallel.context.split import join_parts, take_part

_KEYS, _GRADIENTS = 0, 1  # tags of the two things that travel


class RingAttention(torch.autograd.Function):
    """q [b, n, s, d], k and v [b, k, s, d] -> [b, n, s, d]; `plan` is a `ring_plan`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        plan: Plan,
        group: dist.ProcessGroup,
        operators: Operators,
    ) -> Tensor:
        held = own = torch.stack((k, v))
        merged = _Merged(q)
        for step, blocks in enumerate(plan):
            arriving = _pass_on(held, group, _KEYS) if step + 1 < len(plan) else None
            for block in blocks:
                merged.add(block, *_block_forward(operators, q, held, block, scale))
            if arriving is not None:
                held = arriving.wait()
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, own, out, merged.lse)
        ctx.scale, ctx.plan, ctx.group, ctx.operators = scale, plan, group, operators
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, held, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(q, dtype=_wide(q))
        travelling: _Transfer | None = None
        for step, blocks in enumerate(ctx.plan):
            arriving = _pass_on(held, ctx.group, _KEYS) if step + 1 < len(ctx.plan) else None
            grads = [
                _block_backward(ctx.operators, grad_outputs[0], q, held, out, lse, block, ctx.scale) for block in blocks
            ]
            # What processes before this one found out about the gradient of these keys has been on its way meanwhile.
            grad_held = torch.zeros_like(held, dtype=_wide(q)) if travelling is None else travelling.wait()
            for block, found in zip(blocks, grads, strict=True):
                _add(grad_q, grad_held, block, *found)
            travelling = _pass_on(grad_held, ctx.group, _GRADIENTS)
            if arriving is not None:
                held = arriving.wait()
        assert travelling is not None
        grad_k, grad_v = travelling.wait().to(q.dtype)  # after a whole turn they are home
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


class GatheredAttention(torch.autograd.Function):
    """q [b, n, s, d], k and v [b, k, s, d] -> [b, n, s, d]; `plan` is a `gathered_plan`.

    Keys are gathered again in backward rather than kept: only one layer's are in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        plan: Plan,
        group: dist.ProcessGroup,
        operators: Operators,
    ) -> Tensor:
        own = torch.stack((k, v))
        whole = _gather_keys(own, group)
        merged = _Merged(q)
        for block in plan[0]:
            merged.add(block, *_block_forward(operators, q, whole, block, scale))
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, own, out, merged.lse)
        ctx.scale, ctx.plan, ctx.group, ctx.operators = scale, plan, group, operators
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, own, out, lse = ctx.saved_tensors
        whole = _gather_keys(own, ctx.group)
        grad_q, grad_whole = torch.zeros_like(q, dtype=_wide(q)), torch.zeros_like(whole, dtype=_wide(q))
        for block in ctx.plan[0]:
            found = _block_backward(ctx.operators, grad_outputs[0], q, whole, out, lse, block, ctx.scale)
            _add(grad_q, grad_whole, block, *found)
        del whole
        contexts = ctx.group.size()
        parts = torch.stack([take_part(grad_whole, contexts, rank, dim=3) for rank in range(contexts)])
        grad_k, grad_v = scatter_sum(parts, 0, ctx.group)[0].to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


class _Merged:
    """Attention to several blocks of keys as if it had been one: out [b, n, s, d] and lse [b, n, s], fp32 or wider.

    Of two partial results each counts with its share of the total weight, exp(lse) (arXiv 2205.14135, section 3.1).
    """

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros_like(q, dtype=_wide(q))
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=_wide(q), device=q.device)

    def add(self, block: Block, out: Tensor, lse: Tensor) -> None:
        """Merge what `block.rows` found. The first block of a query holds the query itself, so a sum is never empty."""
        before, lse = self.lse[:, :, block.rows], lse.to(self.lse.dtype)
        share = torch.sigmoid(lse - before)
        self.out[:, :, block.rows].lerp_(out.to(self.out.dtype), share[..., None])
        before.copy_(torch.logaddexp(before, lse))


class _Transfer:
    """Something sent to the next process while its like comes in from the one before; both must stay until the end."""

    def __init__(self, leaving: Tensor, arriving: Tensor, works: list[dist.Work]) -> None:
        self._leaving, self._arriving, self._works = leaving, arriving, works

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._arriving


def _pass_on(x: Tensor, group: dist.ProcessGroup, tag: int) -> _Transfer:
    """Send a contiguous tensor to the next process of the ring and receive one like it; returns at once."""
    arriving = torch.empty_like(x)
    following, preceding = (dist.get_global_rank(group, (group.rank() + n) % group.size()) for n in (1, -1))
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, following, group, tag), dist.P2POp(dist.irecv, arriving, preceding, group, tag)]
    )
    return _Transfer(x, arriving, works)


def _gather_keys(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keys and values of the whole sequence in its order: [2, b, k, s, d] -> [2, b, k, contexts * s, d]."""
    return join_parts(gather(own[None], 0, group).unbind(), dim=3)


def _block_forward(operators: Operators, q: Tensor, kv: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    k, v = kv[:, :, :, block.columns]
    return operators.attention_with_lse(q[:, :, block.rows], k, v, scale=scale, causal=block.causal, mask=block.mask)


def _block_backward(
    operators: Operators, grad_out: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = block.rows
    k, v = kv[:, :, :, block.columns]
    return operators.attention_backward(
        grad_out[:, :, rows],
        q[:, :, rows],
        k,
        v,
        out[:, :, rows],
        lse[:, :, rows],
        scale=scale,
        causal=block.causal,
        mask=block.mask,
    )


def _add(grad_q: Tensor, grad_kv: Tensor, block: Block, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    grad_q[:, :, block.rows] += dq
    grad_kv[0, :, :, block.columns] += dk
    grad_kv[1, :, :, block.columns] += dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
