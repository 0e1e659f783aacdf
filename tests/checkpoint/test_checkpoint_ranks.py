"""Two gloo ranks write one checkpoint together; one, two or other layouts read it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tiny_state import litter
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from anychip.errors import UnfitError
from anychip.train.checkpoint import CheckpointError, CheckpointStore
from anychip.train.checkpoint import save as save_module
from anychip.train.checkpoint import store as store_module
from anychip.train.checkpoint.directory import read_manifest as read

RANKS = 2
FULL = {
    "model.rows": torch.arange(35.0).view(5, 7),
    "model.columns": torch.arange(24).view(3, 8).to(torch.bfloat16),
    "model.single": torch.arange(1.0).view(1, 1),
    "model.replicated": torch.arange(6.0).view(2, 3),
    "optimizer.step": torch.tensor(12),
}
LAYOUTS: list[dict[str, Placement]] = [
    {"model.rows": Shard(0), "model.columns": Shard(1), "model.single": Shard(0), "model.replicated": Replicate()},
    {"model.rows": Shard(1), "model.columns": Shard(0), "model.single": Replicate(), "model.replicated": Shard(1)},
]


def test_two_ranks_save_and_every_layout_loads(tmp_path: Path) -> None:
    alone = CheckpointStore(tmp_path / "alone")
    alone.save(1, FULL, {})
    multiprocessing.spawn(_rank, (tmp_path,), RANKS)
    store = CheckpointStore(tmp_path / "together")
    for step in (0, 1, 10, 11):
        info = store.open(step)
        assert sorted(info.manifest.files) == ["rank-0000.safetensors", "rank-0001.safetensors"]
        into = {name: torch.zeros_like(tensor) for name, tensor in FULL.items()}
        store.load(info, into)
        assert all(torch.equal(into[name], FULL[name]) for name in FULL)
        streamed = dict(store.read(info))
        assert all(torch.equal(streamed[name], FULL[name]) for name in FULL)
    assert store.steps() == [0, 1, 10, 11] and not litter(tmp_path / "together")


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    mesh = init_device_mesh("cpu", (RANKS,))
    store = CheckpointStore(folder / "together", group=group)

    def laid_out(layout: dict[str, Placement], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: distribute_tensor(tensor.clone(), mesh, [layout[name]]) if name in layout else tensor.clone()
            for name, tensor in tensors.items()
        }

    def holds_all(state: dict[str, Tensor]) -> bool:
        full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
        return all(torch.equal(full[name], FULL[name]) for name in FULL)

    zeros = {name: torch.zeros_like(tensor) for name, tensor in FULL.items()}
    for number, layout in enumerate(LAYOUTS):
        store.save(number, laid_out(layout, FULL), {})
        info = store.latest()
        assert info and info.step == number
        for other in LAYOUTS:
            into = laid_out(other, zeros)
            store.load(info, into)
            assert holds_all(into)
            into = laid_out(other, zeros)
            store.load(CheckpointStore(folder / "alone").open(1), into)
            assert holds_all(into)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(save_module, "ShardWriter", _broken_disk)
        with pytest.raises(CheckpointError, match="rank 1: Input/output error"):
            store.save(5, laid_out(LAYOUTS[0], FULL), {})
    for number, layout in enumerate(LAYOUTS):
        state = laid_out(layout, FULL)
        store.save_async(10 + number, state, {})
        for tensor in state.values():
            tensor.zero_()
        dist.barrier()  # the job's own collectives go on meanwhile
    store.wait()
    with pytest.MonkeyPatch.context() as patch:  # a rank that cannot read tells the others, who would wait for it
        if rank == 1:
            patch.setattr(
                store_module, "read_manifest", lambda path: _broken_disk() if "11" in path.name else read(path)
            )
        older = store.latest()
        assert older and older.step == 10
        if rank == 0:
            patch.setattr(store_module, "complete_steps", _broken_disk)
        with pytest.raises(UnfitError, match="cannot be read"):
            store.latest()
    dist.barrier()
    dist.destroy_process_group()


def _broken_disk(*_: object) -> None:
    raise OSError(5, "Input/output error")
