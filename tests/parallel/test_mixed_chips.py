"""A pipeline whose stages lie on chips of different makes trains as one process does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import LayoutRun, train
from rank_pool import run_ranks
from safetensors.torch import load_file, save_file

from anychip.chips.emulated.build import library
from anychip.errors import AnychipError, InputError
from anychip.parallel.layout import check_layout, resolve_layout
from anychip.recipe.schema import ParallelConfig

FP32: dict[str, Any] = {"dtype": "float32"}
LAYOUTS = [
    {"pipeline_parallel": 2, "host_transfers": True},
    {"pipeline_parallel": 2, "host_transfers": True, "pipeline_layers": [5, 3]},
    {"pipeline_parallel": 2, "host_transfers": True, "pipeline_schedule": "interleaved", "virtual_pipeline": 2},
]


def train_on_its_own_chip(argument: tuple[dict[str, Any], Path]) -> None:
    """Even ranks compute on the CPU, odd ones on the emulated chip."""
    parallel, out = argument
    rank = int(os.environ["RANK"])
    if rank % 2:
        os.environ.update(ANYCHIP_CHIP="emulated", ANYCHIP_EMULATED="worst")
    found = train(LayoutRun(parallel, 1, FP32))
    save_file({name: value.contiguous() for name, value in found["weights"].items()}, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps({key: found[key] for key in ("losses", "norms", "score")}))


@pytest.mark.parametrize(
    "parallel", LAYOUTS, ids=lambda parallel: "-".join(map(str, list(parallel.values())[2:])) or "even"
)
def test_two_makes_of_chips_train_as_one_process(tmp_path: Path, parallel: dict[str, Any]) -> None:
    try:
        library()
    except AnychipError as error:
        pytest.skip(f"the emulated accelerator cannot be built: {error}")
    torch.set_num_threads(1)
    alone = train(LayoutRun({}, 4, FP32))
    run_ranks(2, train_on_its_own_chip, (parallel, tmp_path), tmp_path)
    weights: dict[str, torch.Tensor] = {}
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        weights |= load_file(tmp_path / f"{rank}.safetensors")
    assert weights.keys() == alone["weights"].keys()
    apart = sum(
        float((weights[name].double() - value.double()).square().sum()) for name, value in alone["weights"].items()
    )
    size = sum(float(value.double().square().sum()) for value in alone["weights"].values())
    assert (apart / size) ** 0.5 < 1e-6


def test_only_pipeline_stages_are_joined_through_the_host() -> None:
    from layout_runs import MODEL

    config = ParallelConfig(pipeline_parallel=2, tensor_parallel=2, host_transfers=True)
    with pytest.raises(InputError, match="host_transfers joins pipeline stages"):
        check_layout(config, resolve_layout(config, 4), MODEL)
