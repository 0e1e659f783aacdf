"""Every layout trains as one process does: 20 steps in fp64, gradients of step 1 tensor by tensor, final weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import LayoutRun, read, run_layouts, train

LOSS, WEIGHT = 1e-12, 1e-9  # relative; in fp32 rounding alone moves losses by 1e-7
PATIENCE = 3000  # seconds for all layouts of one number of processes, on a machine that does other things too


def pipeline(size: int, schedule: str, **more: Any) -> dict[str, Any]:
    if schedule == "interleaved":
        more["virtual_pipeline"] = 2
    return {"pipeline_parallel": size, "pipeline_schedule": schedule, **more}


TWO = [
    LayoutRun({"data_parallel_replicate": 2}, 4),
    LayoutRun({"data_parallel_shard": 2}, 4),
    LayoutRun({"tensor_parallel": 2}, 4),
    LayoutRun({"context_parallel": 2}, 4),
    LayoutRun({"context_parallel": 2, "context_method": "all_gather"}, 4),
    LayoutRun(pipeline(2, "gpipe"), 4),
    LayoutRun(pipeline(2, "1f1b"), 2),
    LayoutRun(pipeline(2, "1f1b", pipeline_layers=[3, 5]), 4),
    LayoutRun(pipeline(2, "interleaved"), 4),
    LayoutRun(pipeline(2, "zero_bubble"), 4),
    LayoutRun(pipeline(2, "dualpipe_v"), 4),
    LayoutRun({"tensor_parallel": 2}, 8, {"optimizer": "muon"}),
    LayoutRun({"data_parallel_shard": 2}, 8, {"optimizer": "muon"}),
    LayoutRun({"data_parallel_shard": 2}, 4, {"recompute": "full"}),
    LayoutRun(pipeline(2, "1f1b"), 4, {"recompute": "selective"}),
]
DOCUMENTS = {"documents": True}
TWO += [
    LayoutRun({"tensor_parallel": 2}, 8, DOCUMENTS),
    LayoutRun({"context_parallel": 2}, 8, DOCUMENTS),
    LayoutRun({"context_parallel": 2, "context_method": "all_gather"}, 8, DOCUMENTS),
    LayoutRun(pipeline(2, "1f1b"), 4, DOCUMENTS),
]
DROPOUT = {"changes": {"hidden_dropout": 0.1}}
TWO += [
    LayoutRun({"data_parallel_shard": 2}, 4, {**DROPOUT, "recompute": "full"}),
    LayoutRun({"tensor_parallel": 2}, 8, DROPOUT),
    LayoutRun({"context_parallel": 2}, 4, DROPOUT),
    LayoutRun(pipeline(2, "1f1b"), 2, {**DROPOUT, "recompute": "full"}),
    LayoutRun(pipeline(2, "zero_bubble"), 4, DROPOUT),
]
FOUR = [
    LayoutRun({"data_parallel_replicate": 4}, 4),
    LayoutRun({"data_parallel_shard": 4}, 4),
    LayoutRun({"tensor_parallel": 4}, 8),
    LayoutRun({"context_parallel": 4}, 8),
    LayoutRun({"context_parallel": 4, "context_method": "all_gather"}, 8),
    LayoutRun(pipeline(4, "gpipe"), 4),
    LayoutRun(pipeline(4, "1f1b"), 4),
    LayoutRun(pipeline(4, "interleaved"), 4),
    LayoutRun(pipeline(4, "zero_bubble"), 4),
    LayoutRun(pipeline(4, "dualpipe_v"), 2),
    LayoutRun({"data_parallel_replicate": 2, "data_parallel_shard": 2}, 4),
    LayoutRun({"data_parallel_replicate": 2, "tensor_parallel": 2}, 8),
    LayoutRun({"data_parallel_shard": 2, "tensor_parallel": 2}, 8),
    LayoutRun({"data_parallel_shard": 2, "context_parallel": 2}, 8),
    LayoutRun({"data_parallel_replicate": 2, "context_parallel": 2}, 8),
    LayoutRun({"tensor_parallel": 2, "context_parallel": 2}, 8),
    LayoutRun({"data_parallel_shard": 2, **pipeline(2, "1f1b")}, 4),
    LayoutRun({"data_parallel_replicate": 2, **pipeline(2, "interleaved")}, 4),
    LayoutRun({"tensor_parallel": 2, **pipeline(2, "zero_bubble")}, 8),
    LayoutRun({"context_parallel": 2, **pipeline(2, "1f1b")}, 8),
    LayoutRun({"tensor_parallel": 2, "data_parallel_shard": 2}, 8, {"optimizer": "muon"}),
    LayoutRun({"tensor_parallel": 2, "context_parallel": 2}, 4, DROPOUT),
    LayoutRun({"data_parallel_replicate": 2, **pipeline(2, "interleaved")}, 4, DROPOUT),
]
EIGHT = [
    LayoutRun({"data_parallel_replicate": 2, "data_parallel_shard": 2, "tensor_parallel": 2}, 4),
    LayoutRun({"data_parallel_shard": 2, "tensor_parallel": 2, "context_parallel": 2}, 8),
    LayoutRun({"data_parallel_shard": 2, "tensor_parallel": 2, **pipeline(2, "1f1b")}, 4),
    LayoutRun({"data_parallel_replicate": 2, "tensor_parallel": 2, **pipeline(2, "zero_bubble")}, 4),
    LayoutRun({"data_parallel_replicate": 2, "data_parallel_shard": 2, **pipeline(2, "interleaved")}, 2),
    LayoutRun({"context_parallel": 2, "tensor_parallel": 2, **pipeline(2, "1f1b")}, 8),
    LayoutRun({"context_parallel": 2, "data_parallel_shard": 2, **pipeline(2, "dualpipe_v")}, 2),
    LayoutRun({"tensor_parallel": 4, "data_parallel_shard": 2}, 8),
    LayoutRun({"tensor_parallel": 2, **pipeline(4, "1f1b")}, 4),
    LayoutRun({"data_parallel_shard": 2, **pipeline(4, "zero_bubble")}, 2),
    LayoutRun({"tensor_parallel": 2, "data_parallel_shard": 2, **pipeline(2, "dualpipe_v")}, 2, DROPOUT),
]
COMPILED = [
    LayoutRun({"data_parallel_shard": 2}, 4, {"compile": True}),
    LayoutRun({"tensor_parallel": 2}, 4, {"compile": True}),
    LayoutRun({"context_parallel": 2}, 4, {"compile": True}),
    LayoutRun({"context_parallel": 2, "context_method": "all_gather"}, 4, {"compile": True}),
    LayoutRun(pipeline(2, "1f1b"), 4, {"compile": True}),
    LayoutRun({"tensor_parallel": 2}, 4, {"compile": True, **DROPOUT}),
]
SLOW = [*FOUR, *EIGHT, *COMPILED]
LAYOUTS = {run.name: run for run in [*TWO, *SLOW]}


def numbers_of(job: dict[str, Any]) -> str:
    return f"{job.get('optimizer', 'adamw')}, documents {job.get('documents', False)}, {job.get('changes', {})}"


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    """What one process computes, by what of the job decides it."""
    torch.set_num_threads(1)
    jobs: list[dict[str, Any]] = [{}, {"optimizer": "muon"}, DOCUMENTS, DROPOUT]
    try:
        return {numbers_of(job): train(LayoutRun({}, 4, job)) for job in jobs}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Where the runs of one number of processes are, or those with compiled layers, trained when first asked for."""
    folder = tmp_path_factory.mktemp("layouts")
    groups = {2: TWO, 4: FOUR, 8: EIGHT}

    @cache
    def trained(world_size: int, compiled: bool = False) -> Path:
        run_layouts(COMPILED if compiled else groups[world_size], folder, timeout=PATIENCE)
        return folder

    return trained


@pytest.mark.timeout(PATIENCE + 300)
@pytest.mark.parametrize(
    "name",
    [*(run.name for run in TWO), *(pytest.param(run.name, marks=pytest.mark.slow) for run in SLOW)],
)
def test_a_layout_trains_as_one_process_does(
    name: str, one_process: dict[str, dict[str, Any]], results: Callable[..., Path]
) -> None:
    run = LAYOUTS[name]
    expected, found = one_process[numbers_of(run.job)], read(run, results(run.world_size, run in COMPILED))
    for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert abs(mine / theirs - 1) < LOSS
    for mine, theirs in zip(found["norms"], expected["norms"], strict=True):
        assert abs(mine / theirs - 1) < WEIGHT
    assert abs(found["score"] / expected["score"] - 1) < LOSS
    tensors = {f"{kind}.{key}": value for kind in ("gradients", "weights") for key, value in expected[kind].items()}
    assert found["tensors"].keys() == tensors.keys()
    for key, value in tensors.items():
        assert (found["tensors"][key] - value).norm() <= WEIGHT * value.norm(), key
