"""`emulated_ccl` does what gloo does, refuses what the chip lacks, and carries every way of splitting a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from device_process import needs_device, on_device
from torch import Tensor, nn

pytestmark = needs_device


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else torch.device("emulated", dist.get_rank())


def _every_collective() -> list[Any]:
    """What each gives here, of tensors that tell ranks and positions apart."""
    device, rank, size = _device(), dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}

    def mine(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.arange(count, dtype=dtype, device=device) + 10 * rank

    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for op in ("SUM", "MAX", "MIN", "PRODUCT"):
            x = mine(dtype=dtype)
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
            found[f"all_reduce {op} {dtype}"] = x
    found["broadcast"] = x = mine()
    dist.broadcast(x, 1)
    found["reduce"] = x = mine()
    dist.reduce(x, 0)
    found["all_gather"] = [torch.empty(4, device=device) for _ in range(size)]
    dist.all_gather(found["all_gather"], mine())
    found["into"] = torch.empty(4 * size, device=device)
    dist.all_gather_into_tensor(found["into"], mine())
    found["reduce_scatter"] = torch.empty(4, device=device)
    dist.reduce_scatter_tensor(found["reduce_scatter"], mine(4 * size))
    found["reduce_scatter list"] = torch.empty(4, device=device)
    dist.reduce_scatter(found["reduce_scatter list"], [mine() + i for i in range(size)])
    found["all_to_all"] = torch.empty(6, device=device)
    sizes = [[2, 4], [4, 2]][rank]
    dist.all_to_all_single(found["all_to_all"], mine(6), sizes, sizes)
    gathered = [torch.empty(4, device=device) for _ in range(size)] if rank == 0 else None
    dist.gather(mine(), gathered)
    found["gather"] = gathered
    found["scatter"] = torch.empty(4, device=device)
    dist.scatter(found["scatter"], [mine() + 100 * i for i in range(size)] if rank == 0 else None)
    sent, received = mine(), torch.empty(4, device=device)
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
    ):
        work.wait()
    found["exchange"] = received
    found["async"] = x = mine()
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    with dist._coalescing_manager(async_ops=False):
        for x in (many := [mine(), mine(3)]):
            dist.all_reduce(x)
    found["coalesced"] = many
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    found["objects"] = objects
    dist.barrier()
    return [f"{name}: {value}".replace(f", device='{device}'", "") for name, value in found.items()]


def test_collectives_agree_with_gloo(tmp_path: Path) -> None:
    there = on_device(_every_collective, tmp_path, world_size=2)
    assert there == on_device(_every_collective, tmp_path, world_size=2, chip="cpu")


def _averages() -> None:
    x = torch.full((2,), float(dist.get_rank()), device=_device())
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert x.tolist() == [0.5, 0.5]
    whole = torch.arange(4.0, device=_device())
    part = torch.empty(2, device=_device())
    dist.reduce_scatter_tensor(part, whole, dist._make_nccl_premul_sum(0.25))
    assert part.tolist() == [[0.0, 0.5], [1.0, 1.5]][dist.get_rank()]
    assert whole.tolist() == [0, 1, 2, 3]  # inputs are left as they were
    work = dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.AVG, async_op=True)
    assert work is not None
    work.wait()
    work.wait()  # divides once
    assert part.tolist() == [[0.0, 1.0], [2.0, 3.0]][dist.get_rank()]


def test_averages_and_scaled_sums_are_done_where_no_quirk_forbids_them(tmp_path: Path) -> None:
    on_device(_averages, tmp_path, world_size=2)


def _refusals() -> None:
    device = _device()
    x, part = torch.ones(4, device=device), torch.ones(2, device=device)
    for op, quirk in ((dist.ReduceOp.AVG, "no_avg"), (dist._make_nccl_premul_sum(0.5), "no_premul_sum")):
        with pytest.raises(RuntimeError, match=quirk):
            dist.all_reduce(x, op)
        with pytest.raises(RuntimeError, match=quirk):
            dist.reduce_scatter_tensor(part, x, op)
        with pytest.raises(RuntimeError, match=quirk):
            dist.reduce(x, 0, op)
    with pytest.raises(RuntimeError, match="no_int64_reduce"):
        dist.all_reduce(torch.ones(2, dtype=torch.int64, device=device))
    dist.all_gather_into_tensor(torch.empty(4, dtype=torch.int64, device=device), part.long())  # moving is allowed
    dist.all_reduce(x)
    assert x.tolist() == [2, 2, 2, 2]


def test_what_the_chip_lacks_is_refused_by_name(tmp_path: Path) -> None:
    on_device(_refusals, tmp_path, world_size=2, quirks="no_avg,no_premul_sum,no_int64_reduce,no_fp64")


def _slow() -> list[float]:
    x = torch.ones(500_000, device=_device())  # 2 MB, and as much crosses the link of a ring of two
    dist.all_reduce(x[:1])
    started = time.perf_counter()
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(x.clone(), async_op=True)]
    posted = time.perf_counter() - started
    assert not any(work.is_completed() for work in works if work is not None)
    for work in works:
        assert work is not None
        work.wait()
    return [posted, time.perf_counter() - started]


def test_slow_links_take_their_time_beside_computation(tmp_path: Path) -> None:
    for posted, done in on_device(_slow, tmp_path, world_size=2, quirks="slow_links=5MB/s"):
        assert posted < 0.4 <= 0.8 <= done


def _layers(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    return nn.Sequential(*parts).to(device)  # made on the CPU, so equal everywhere


def _rows(device: torch.device, seed: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def _steps(model: nn.Module, device: torch.device, *, fused: bool, seed: int) -> list[str]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused, foreach=False)
    losses = []
    for step in range(4):
        loss = model(_rows(device, seed + step)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def _sharded() -> list[list[str]]:
    """FSDP2 in fp32 and mixed precision; sums are forced, as chips without AVG need."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    device, losses = _device(), []
    mesh = init_device_mesh(device.type, (2,))
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)):
        model = _layers(device)
        for layer in (*model, model):
            if isinstance(layer, (nn.Linear, nn.Sequential)):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(2.0)
        losses.append(_steps(model, device, fused=True, seed=100 * dist.get_rank()))
        optimizer = torch.optim.SGD(model.parameters())
        model(_rows(device, 0)).float().sum().backward()
        losses.append([nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item().hex()])
        optimizer.step()
    return losses


def _tensor_parallel() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    device = _device()
    model = _layers(device)
    parallelize_module(model, init_device_mesh(device.type, (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return _steps(model, device, fused=False, seed=0)


def _replicated() -> list[str]:
    """DistributedDataParallel, which waits by futures."""
    device = _device()
    return _steps(nn.parallel.DistributedDataParallel(_layers(device)), device, fused=True, seed=100 * dist.get_rank())


def _pipeline() -> list[str]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    device, rank = _device(), dist.get_rank()
    layers = list(_layers(device))
    part = nn.Sequential(*(layers[2:] if rank else layers[:2]))
    schedule = Schedule1F1B(PipelineStage(part, rank, 2, device), 4, loss_fn=F.mse_loss)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(_rows(device, 0))
    else:
        schedule.step(target=torch.zeros(8, 8, device=device), losses=losses)
    gradients = [parameter.grad for parameter in part.parameters()]
    return [x.norm().item().hex() for x in (*losses, *gradients) if x is not None]


@pytest.mark.parametrize(
    "work", [_sharded, _replicated, _tensor_parallel, _pipeline], ids=lambda work: work.__name__.strip("_")
)
def test_a_model_split_over_two_processes_trains_as_on_the_cpu(work: Any, tmp_path: Path) -> None:
    worst = "worst,memory=100MB,cpu_watch"
    there = on_device(work, tmp_path, world_size=2, quirks=worst)
    assert there == on_device(work, tmp_path, world_size=2, chip="cpu")
