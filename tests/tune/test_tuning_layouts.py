"""Adapters and preferences train under each layout as in one process: 4 steps in fp64, losses, gradients, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import LayoutRun, build, read, run_layouts, train

from anychip.errors import InputError
from anychip.parallel.processes import Processes

LORA = {"lora": {"rank": 3, "alpha": 6.0}}
JOBS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dpo": {"preference": "dpo"},
    "ipo": {"preference": "ipo"},
    "dpo with lora": {"preference": "dpo", **LORA},
    "policy": {"policy": "sequence"},
    "policy by token": {"policy": "token"},
}
RUNS = [
    ("lora", LayoutRun({"data_parallel_replicate": 2}, 4, LORA)),
    ("lora", LayoutRun({"data_parallel_shard": 2}, 4, LORA)),
    ("lora", LayoutRun({"tensor_parallel": 2}, 8, {**LORA, "recompute": "full"})),
    ("lora", LayoutRun({"tensor_parallel": 2}, 8, {**LORA, "recompute": "selective"})),
    ("lora", LayoutRun({"context_parallel": 2}, 8, LORA)),
    ("dpo", LayoutRun({"data_parallel_replicate": 2}, 4, JOBS["dpo"])),
    ("ipo", LayoutRun({"data_parallel_shard": 2}, 4, JOBS["ipo"])),
    ("dpo", LayoutRun({"tensor_parallel": 2}, 8, JOBS["dpo"])),
    ("policy", LayoutRun({"data_parallel_replicate": 2}, 4, JOBS["policy"])),
    ("policy by token", LayoutRun({"data_parallel_shard": 2}, 4, JOBS["policy by token"])),
    ("policy", LayoutRun({"tensor_parallel": 2}, 8, JOBS["policy"])),
    ("dpo with lora", LayoutRun({"tensor_parallel": 2}, 8, JOBS["dpo with lora"])),
]
STEPS = 4


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    try:
        return {name: train(LayoutRun({}, 4, job), STEPS) for name, job in JOBS.items()}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    run_layouts([run for _, run in RUNS], folder, timeout=280, steps=STEPS)
    return folder


@pytest.mark.parametrize(("job", "run"), RUNS, ids=[f"{job}: {run.name}" for job, run in RUNS])
def test_a_layout_tunes_as_one_process_does(
    job: str, run: LayoutRun, one_process: dict[str, dict[str, Any]], results: Path
) -> None:
    expected, found = one_process[job], read(run, results)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    assert found["score"] == pytest.approx(expected["score"], rel=1e-12)
    for kind in ("gradients", "weights"):
        for name, value in expected[kind].items():
            difference = (found["tensors"][f"{kind}.{name}"] - value).norm()
            assert difference <= 1e-9 * value.norm() + 1e-15, name


def test_only_adapters_are_learned(one_process: dict[str, dict[str, Any]]) -> None:
    whole, adapters = one_process["dpo"], one_process["lora"]
    assert all(".adapter." in name for name in adapters["gradients"])
    assert len(adapters["gradients"]) == 8 * 7 * 2
    assert not any(".adapter." in name for name in whole["gradients"])


@pytest.mark.parametrize(
    ("parallel", "job", "says"),
    [
        ({"pipeline_parallel": 2}, LORA, "adapters .* pipeline"),
        ({"pipeline_parallel": 2}, JOBS["dpo"], "whole sequences"),
        ({"context_parallel": 2}, JOBS["dpo"], "whole sequences"),
        ({"context_parallel": 2}, JOBS["policy"], "whole sequences"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    parallel: dict[str, Any], job: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("anychip.parallel.processes.init_device_mesh", lambda *_, **__: None)
    monkeypatch.setattr(Processes, "mesh", lambda *_: None)
    try:
        with pytest.raises(InputError, match=says):
            build(LayoutRun(parallel, 8, job))
    finally:
        torch.set_default_dtype(torch.float32)
