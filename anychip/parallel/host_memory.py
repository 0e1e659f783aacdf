"""Shards of processes on one host travel through memory that they share, where messages would go through sockets.

FSDP2 lets its two collectives be replaced. Here a process puts what others need where they can read it, all meet at a
barrier, and each takes its part: one copy by the receiver, instead of copies into and out of a socket on both sides.
There are two places to put it, in turn: whoever writes one again has met everyone since it was read.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from anychip.chips.environment import boot_id
from anychip.parallel.messages import axes_of, telling

_SHARED = Path("/dev/shm")
_PAGE = 1 << 21


def share_host_memory(modules: Sequence[FSDPModule], mesh: DeviceMesh | None) -> None:
    """Let the shards of these modules over a mesh (shard, or replicate x shard) travel through shared memory, if all
    who have a shard of the same copy are on one host.

    Every process of the mesh must ask, for the same modules: they meet.
    """
    if not modules or mesh is None or not hasattr(FSDPModule, "set_custom_all_gather"):
        return
    group = mesh.get_group(mesh.ndim - 1)
    if group.size() == 1 or not _is_gloo(group) or not _all_here(group):
        return
    exchange = HostExchange(group)
    for module in modules:
        module.set_custom_all_gather(GatherShards(exchange))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(SumShards(exchange))  # type: ignore[arg-type]


class HostExchange:
    """Memory that each process of a group writes for itself and reads of the others. Collective, like the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank = group, group.rank()
        self._sides: list[list[Tensor]] = [[], []]  # of every process, uint8 [capacity]
        self._turn = 0

    def offer(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Put down contiguous tensors and meet -> what each process put down, in the order of ranks, uint8 [bytes].

        Sizes must be the same everywhere. What is returned is valid until the next call but one.
        """
        size = sum(part.nbytes for part in parts)
        self._turn ^= 1
        if not self._sides[self._turn] or len(self._sides[self._turn][0]) < size:
            self._sides[self._turn] = self._map(-(-size // _PAGE) * _PAGE)
        side, start = self._sides[self._turn], 0
        for part in parts:
            side[self._rank][start : start + part.nbytes].copy_(part.view(-1).view(torch.uint8))
            start += part.nbytes
        dist.barrier(self._group)
        return [everyones[:size] for everyones in side]

    def _map(self, capacity: int) -> list[Tensor]:
        """Memory of this size for every process. Its files have no names once all have opened them, so that the end of
        a process, whatever it is, leaves nothing behind."""
        name = _SHARED / f"anychip-{os.getpid()}-{os.urandom(6).hex()}"
        names: list[str] = [""] * self._group.size()
        mine = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(mine, 0, capacity)  # no room is an error here, not a signal later
            dist.all_gather_object(names, str(name), group=self._group)
            opened = [mine if rank == self._rank else os.open(names[rank], os.O_RDWR) for rank in range(len(names))]
            dist.barrier(self._group)
        finally:
            name.unlink()
        mapped = [torch.frombuffer(mmap.mmap(handle, capacity), dtype=torch.uint8) for handle in opened]
        for handle in opened:
            os.close(handle)
        return mapped


class _Memory:
    """Where FSDP2 puts what a collective reads and writes: memory of its own process."""

    def __init__(self, exchange: HostExchange) -> None:
        self._exchange = exchange

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GatherShards(_Memory):
    """Everyone's shards, one after the other. In the place of `torch.distributed.fsdp`'s AllGather."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        with telling("all_gather", axes_of(group), output_tensor.nbytes):
            everyones = self._exchange.offer([input_tensor])
            for place, shards in zip(output_tensor.chunk(len(everyones)), everyones, strict=True):
                if place.data_ptr() != input_tensor.data_ptr():
                    place.copy_(shards.view(place.dtype))


class SumShards(_Memory):
    """The sum of everyone's gradients of this process's shards, added up in the order of ranks. In the place of
    `torch.distributed.fsdp`'s ReduceScatter."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM, "sharding asks for nothing but sums"
        rank, shards = group.rank(), input_tensor.chunk(group.size())
        with telling("reduce_scatter", axes_of(group), output_tensor.nbytes):
            # Everyone puts down all shards but its own, which nobody else reads.
            everyones = self._exchange.offer([shard for number, shard in enumerate(shards) if number != rank])
            parts = [side.view(input_tensor.dtype).view(-1, len(shards[0])) for side in everyones]
            mine = [part[rank - (sender < rank)] for sender, part in enumerate(parts) if sender != rank]
            mine.insert(rank, shards[rank])
            torch.add(mine[0], mine[1], out=output_tensor)
            for shard in mine[2:]:
                output_tensor.add_(shard)


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return "gloo" in str(dist.get_backend(group))


def _all_here(group: dist.ProcessGroup) -> bool:
    """Whether every process of the group sees the same shared memory."""
    here = (socket.gethostname(), boot_id(), _SHARED.stat().st_dev if _SHARED.is_dir() else None)
    everyone: list[object] = [None] * group.size()
    dist.all_gather_object(everyone, here, group=group)
    return here[-1] is not None and all(other == here for other in everyone)
