"""A process killed where processes share matrices, layers or shards: the run ends with the bits of a calm one.

pytest -m slow tests/supervise/test_deaths_by_layout.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from leftovers import Leftovers
from many_hosts import assert_same, rows, state, wait_for
from tiny_run import finish, start, write_tiny_recipe

STEPS = 300
KILLS = [(0, 13), (1, 60), (0, 110), (1, 170)]  # rank, and the step it is killed in
LAYOUTS = {
    "matrices": "parallel.tensor_parallel=2",
    "layers": "parallel.pipeline_parallel=2",
    "shards": "parallel.data_parallel_shard=2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    return folder


def beat(run: Path, rank: int) -> dict[str, Any]:
    folders = sorted((run / "logs" / "heartbeats").glob("generation-*"))
    try:
        return dict(json.loads((folders[-1] / f"rank-{rank:05d}").read_text()))
    except (IndexError, OSError, ValueError):
        return {"step": 0, "pid": 0}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_process_is_killed_and_no_bit_is_another(folder: Path, tmp_path: Path, layout: str) -> None:
    settings = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=5", LAYOUTS[layout]]
    words = ["--processes", "2", *(word for setting in settings for word in ("--set", setting))]
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for runs in (calm, rough):
        shutil.copytree(folder / "runs", runs)
    finish(folder, "supervise", "tiny.yaml", "--runs", str(calm), *words)
    left = Leftovers(rough)
    process = start(folder, "supervise", "tiny.yaml", "--runs", str(rough), *words)
    run = rough / "tiny"
    incidents = run / "logs" / "incidents.jsonl"
    for number, (rank, step) in enumerate(KILLS, start=1):
        wait_for(lambda rank=rank, step=step: beat(run, rank)["step"] >= step)
        left.look()
        os.kill(beat(run, rank)["pid"], signal.SIGKILL)
        wait_for(lambda number=number: len(deaths(incidents)) >= number)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert deaths(incidents) == [("crash", rank, -9) for rank, _ in KILLS]
    assert_same(state(calm / "tiny", STEPS), state(run, STEPS))
    assert left.found() == []


def deaths(incidents: Path) -> list[tuple[str, int, int | None]]:
    return [(row["kind"], row["rank"], row["code"]) for row in rows(incidents) if row["kind"] != "slow"]
