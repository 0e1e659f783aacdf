"""Layouts on an accelerator that lacks what vendors' chips lack train as one process on the CPU does, in fp32.

No AVG, no PREMUL_SUM, no fp64, no int64 reductions, slow links, 2 GB of memory; a product on the CPU fails the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import LayoutRun, read, run_layouts, train
from test_layouts import DOCUMENTS, DROPOUT, FOUR, PATIENCE, TWO, numbers_of

from anychip.chips.emulated.build import library
from anychip.errors import AnychipError

LOSS, GRADIENT, WEIGHT = 1e-6, 1e-6, 1e-6  # relative; gradients and weights by the norm of all of them together
ENVIRONMENT = {"ANYCHIP_CHIP": "emulated", "ANYCHIP_EMULATED": "worst,cpu_watch"}


def in_fp32(run: LayoutRun) -> LayoutRun:
    return replace(run, job={**run.job, "dtype": "float32"})


COMBINED = [run for run in FOUR if sum(value != 1 for key, value in run.parallel.items() if "parallel" in key) > 1]
FEW, PAIRS = [in_fp32(run) for run in TWO[1:10:2]], [in_fp32(run) for run in TWO[:10:2] + TWO[10:]]
QUADS = [in_fp32(run) for run in COMBINED[::2]]
LAYOUTS = {run.name: run for run in [*FEW, *PAIRS, *QUADS]}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    """What one process computes on the CPU."""
    torch.set_num_threads(1)
    jobs: list[dict[str, Any]] = [{}, {"optimizer": "muon"}, DOCUMENTS, DROPOUT]
    return {numbers_of(job): train(in_fp32(LayoutRun({}, 4, job))) for job in jobs}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LayoutRun], Path]:
    """Where a run is, trained with its group when first asked for."""
    try:
        library()
    except AnychipError as error:
        pytest.skip(f"the emulated accelerator cannot be built: {error}")
    folder, groups = tmp_path_factory.mktemp("emulated_layouts"), (FEW, PAIRS, QUADS)

    @cache
    def trained(group: int) -> Path:
        run_layouts(groups[group], folder, timeout=PATIENCE, environment=ENVIRONMENT)
        return folder

    return lambda run: trained(next(number for number, group in enumerate(groups) if run in group))


@pytest.mark.timeout(PATIENCE + 300)
@pytest.mark.parametrize(
    "name",
    [*(run.name for run in FEW), *(pytest.param(run.name, marks=pytest.mark.slow) for run in [*PAIRS, *QUADS])],
)
def test_a_layout_on_the_emulated_chip_trains_as_the_cpu_does(
    name: str, one_process: dict[str, dict[str, Any]], results: Callable[[LayoutRun], Path]
) -> None:
    run = LAYOUTS[name]
    expected, found = one_process[numbers_of(run.job)], read(run, results(run))
    for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert abs(mine / theirs - 1) < LOSS
    for kind, bar in (("gradients", GRADIENT), ("weights", WEIGHT)):
        names = expected[kind].keys()
        difference = torch.stack([(found["tensors"][f"{kind}.{n}"] - expected[kind][n]).norm() for n in names]).norm()
        assert difference <= bar * torch.stack([expected[kind][n].norm() for n in names]).norm()
