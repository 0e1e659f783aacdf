"""A property over pairs of layouts: whatever shapes, meshes and placements four ranks save with, any others load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from anychip.train.checkpoint import CheckpointStore

RANKS, EXAMPLES = 4, 40
MESHES = [(4,), (2, 2), (1, 4), (4, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@st.composite
def layouts(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[list[Placement] | None]]:
    """A mesh, and for each tensor its placements on it, or None for a plain tensor on every rank."""
    mesh = draw(st.sampled_from(MESHES))
    placed: list[list[Placement] | None] = []
    for shape in shapes:
        if not shape or (draw(st.booleans()) and draw(st.booleans())):
            placed.append(None)
            continue
        kinds: list[Placement] = [Replicate(), *(Shard(dimension) for dimension in range(len(shape)))]
        placed.append([draw(st.sampled_from(kinds)) for _ in mesh])
    return mesh, placed


@st.composite
def pairs(draw: st.DrawFn) -> Any:
    sizes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
    shapes = draw(st.lists(sizes, min_size=1, max_size=4))
    return shapes, draw(layouts(shapes)), draw(layouts(shapes))


def content(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights and both moments of each, every element with a value of its own."""
    tensors: dict[str, Tensor] = {}
    for number, shape in enumerate(shapes):
        for group in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            count = torch.Size(shape).numel()
            values = torch.arange(count).view(shape) + 1000 * len(tensors) % 127
            tensors[f"{group}.{number}"] = values.to(DTYPES[number % len(DTYPES)])
    return tensors


def laid_out(tensors: dict[str, Tensor], mesh: DeviceMesh, placed: list[list[Placement] | None]) -> dict[str, Tensor]:
    placements = {name: placed[int(name.rpartition(".")[2])] for name in tensors}
    return {
        name: tensor.clone() if placements[name] is None else distribute_tensor(tensor.clone(), mesh, placements[name])
        for name, tensor in tensors.items()
    }


def four_ranks(folder: Path) -> None:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    meshes = {shape: init_device_mesh("cpu", shape) for shape in MESHES}
    store, steps = CheckpointStore(folder / "checkpoints", keep=1, group=group), iter(range(1, 1 << 20))

    # Every rank draws the same examples, and all fail together, so that none waits for another.
    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(pairs())
    def any_layout_fills_any_other(pair: Any) -> None:
        shapes, (saved_mesh, saved), (loaded_mesh, loaded) = pair
        tensors, step = content(shapes), next(steps)
        store.save(step, laid_out(tensors, meshes[saved_mesh], saved), {})
        into = laid_out({n: torch.zeros_like(t) for n, t in tensors.items()}, meshes[loaded_mesh], loaded)
        store.load(store.open(step), into)
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in into.items()}
        alone = CheckpointStore(folder / "checkpoints")
        single = dict(alone.read(alone.open(step)))
        wrong = [n for n, t in tensors.items() if not (torch.equal(whole[n], t) and torch.equal(single[n], t))]
        agreed = torch.tensor(len(wrong))
        dist.all_reduce(agreed)
        assert not agreed, f"rank {dist.get_rank()}: {wrong}"

    any_layout_fills_any_other()
    (folder / f"done-{dist.get_rank()}-{next(steps)}").touch()


def test_any_layout_fills_any_other_optimizer_included(tmp_path: Path) -> None:
    run_ranks(RANKS, four_ranks, tmp_path, tmp_path)
    assert len([path for path in tmp_path.glob("done-*") if int(path.name.split("-")[2]) > EXAMPLES // 2]) == RANKS
