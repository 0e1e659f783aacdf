"""The few collectives that layouts are made of. Reductions are SUM or MAX; nothing else is asked of a library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 << 20
# Newer releases renamed these two; both names mean the same call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Everyone's part of `dim`, in the order of ranks."""
    whole = x.new_empty((group.size(), *x.shape))
    _all_gather(whole.flatten(0, 1), x.contiguous(), group=group)
    return _join(whole, dim)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group; each process keeps its part of `dim`."""
    parts = _cut(x, dim, group.size())
    mine = parts.new_empty(parts.shape[1:])
    _reduce_scatter(mine, parts.flatten(0, 1), op=dist.ReduceOp.SUM, group=group)
    return mine


def sum_in_buckets(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Add up tensors over the group, in place: few large messages instead of many small ones."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0], op=dist.ReduceOp.SUM, group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
        pieces = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(t) for piece, t in zip(pieces, bucket, strict=True)])


class GatherSequence(torch.autograd.Function):
    """[b, s / n, ...] -> [b, s, ...]; backward sums everyone's gradient and keeps its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(grad_outputs[0], 1, ctx.group), None


class ScatterSequence(torch.autograd.Function):
    """Partial sums [b, s, ...] -> [b, s / n, ...] of their total; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_sum(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return gather(grad_outputs[0], 1, ctx.group), None


def _join(parts: Tensor, dim: int) -> Tensor:
    """[n, ..., size, ...] -> [..., n * size, ...]"""
    moved = parts.movedim(0, dim)
    return moved.reshape(*moved.shape[:dim], -1, *moved.shape[dim + 2 :])


def _cut(x: Tensor, dim: int, count: int) -> Tensor:
    """[..., n * size, ...] -> contiguous [n, ..., size, ...]"""
    shape: Sequence[int] = (*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])
    return x.reshape(shape).movedim(dim, 0).contiguous()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
