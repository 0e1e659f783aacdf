"""Shards through shared memory: the numbers that messages give, told of as what they are, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layout_runs import LayoutRun, build
from rank_pool import run_ranks
from torch.distributed.fsdp import FSDPModule

from anychip.parallel import host_memory
from anychip.parallel.host_memory import GatherShards, HostExchange, SumShards
from anychip.parallel.messages import Message, heard_by

SIZES = [1, 7, 1000, 3, 2_000_000, 5]  # shrinking and growing: memory is mapped anew


def ours() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob("anychip-*")]


def numbers(size: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size + rank)).to(dtype)


def compare_with_messages(_: object) -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    exchange = HostExchange(group)
    for length in SIZES:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            part = numbers(length, dtype, rank)
            whole = torch.empty(size * length, dtype=dtype)
            whole.chunk(size)[rank].copy_(part)  # FSDP2 gathers in place
            GatherShards(exchange)(whole, whole.chunk(size)[rank], group)
            assert torch.equal(whole, torch.cat([numbers(length, dtype, other) for other in range(size)]))
        gradients = [numbers(size * length, torch.float32, other) for other in range(size)]
        mine = torch.empty(length)
        SumShards(exchange)(mine, gradients[rank].clone(), group, dist.ReduceOp.SUM)
        expected = gradients[0].chunk(size)[rank].clone()
        for other in gradients[1:]:
            expected += other.chunk(size)[rank]
        assert torch.equal(mine, expected)  # added up in the order of ranks
    dist.barrier()
    assert not ours()


class Heard:
    def __init__(self) -> None:
        self.operations: list[tuple[str, str]] = []

    def entered(self, message: Message) -> None:
        self.operations.append((message.operation, message.group))

    def left(self, entry: None) -> None:
        pass


def train_sharded(_: object) -> None:
    heard = Heard()
    job, _processes, engine, _optimizer = build(LayoutRun({"data_parallel_shard": 2}))
    module = next(part for part in engine.parts if isinstance(part, FSDPModule))
    (group,) = module._get_fsdp_state()._fsdp_param_groups
    assert isinstance(group._all_gather_comm, GatherShards) and isinstance(group._reduce_scatter_comm, SumShards)
    with heard_by(heard, "shard 2"):
        engine.forward_backward(job.source.batch(0))
    everyone = "all processes (shard 2)"
    assert {("all_gather", everyone), ("reduce_scatter", everyone)} <= set(heard.operations)
    assert not any(operation == "barrier" for operation, _ in heard.operations)


def refuse_strangers(_: object) -> None:
    group = dist.group.WORLD
    assert group is not None
    rank = dist.get_rank()
    host_memory.boot_id = lambda: f"host {rank}"  # type: ignore[assignment]
    assert not host_memory._all_here(group)
    host_memory.boot_id = lambda: "one host"  # type: ignore[assignment]
    assert host_memory._all_here(group)


@pytest.mark.parametrize(
    ("world_size", "work"), [(3, compare_with_messages), (2, train_sharded), (2, refuse_strangers)]
)
def test_shared_memory(world_size: int, work: Callable[[object], None], tmp_path: Path) -> None:
    run_ranks(world_size, work, None, tmp_path, timeout=120)
