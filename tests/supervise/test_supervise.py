"""A supervised run survives what kills its processes, and ends with the bits of one that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import finish, prepare_and_run, start

from anychip.rundir import RunDirectory
from anychip.supervise.processes import heartbeat_folders
from anychip.train.checkpoint import CheckpointStore

STEPS = 60
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=5", "checkpoint.keep=0"]
OPTIONS = ["--processes", "2", *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run `tiny` that two supervised processes trained without an incident."""
    return prepare_and_run(tmp_path_factory.mktemp("supervise"), "supervise", "tiny.yaml", *OPTIONS)


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "prepared", tmp_path / "runs")
    return tmp_path / "runs"


def final(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    info = store.open(STEPS)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


def assert_same(folder: Path, runs: Path) -> None:
    expected, found = final(folder / "runs" / "tiny"), final(runs / "tiny")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def beat(runs: Path, rank: int) -> dict[str, Any]:
    """The newest heartbeat of a rank; a step of 0 while there is none."""
    folders = heartbeat_folders(RunDirectory(runs / "tiny"))
    try:
        return dict(json.loads((folders[-1] / f"rank-{rank:05d}").read_text()))
    except (IndexError, OSError, ValueError):
        return {"step": 0, "pid": 0}


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def incidents(runs: Path) -> list[dict[str, Any]]:
    """All but those of slow processes, which a busy machine makes."""
    rows = map(json.loads, (runs / "tiny" / "logs" / "incidents.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] != "slow"]


def supervised(folder: Path, runs: Path, *more: str) -> subprocess.Popen[str]:
    return start(folder, "supervise", "tiny.yaml", "--runs", str(runs), *OPTIONS, *more)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=200)
    return process.returncode, err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_costs_nothing_but_time(folder: Path, runs: Path, victim: int) -> None:
    process = supervised(folder, runs)
    wait_for(lambda: beat(runs, victim)["step"] >= 13)
    os.kill(beat(runs, victim)["pid"], signal.SIGKILL)
    code, err = ended(process)
    assert code == 0, err
    (incident,) = incidents(runs)
    assert (incident["kind"], incident["rank"], incident["code"], incident["action"]) == (
        "crash",
        victim,
        -9,
        "restart",
    )
    assert "was killed by SIGKILL" in err
    assert_same(folder, runs)


def test_a_stopped_process_is_found_named_and_replaced(folder: Path, runs: Path) -> None:
    process = supervised(folder, runs)
    wait_for(lambda: beat(runs, 1)["step"] >= 8)
    stopped = time.monotonic()
    os.kill(beat(runs, 1)["pid"], signal.SIGSTOP)
    path = runs / "tiny" / "logs" / "incidents.jsonl"
    wait_for(lambda: path.is_file() and bool(incidents(runs)))
    seconds = time.monotonic() - stopped
    code, err = ended(process)
    assert code == 0, err
    (incident,) = incidents(runs)
    assert (incident["kind"], incident["rank"], incident["state"]) == ("hang", 1, "T")
    assert any("loop.py" in frame for frame in incident["stack"])
    assert " number " in incident["collective"]
    assert seconds < 7  # 4 s of silence, a moment for stacks, and a machine that does other things
    assert_same(folder, runs)


def test_no_process_outlives_the_supervisor(folder: Path, runs: Path) -> None:
    process = supervised(folder, runs)
    wait_for(lambda: min(beat(runs, 0)["step"], beat(runs, 1)["step"]) >= 2)
    children = [beat(runs, rank)["pid"] for rank in range(2)]
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children), seconds=5)
    code, err = ended(supervised(folder, runs))
    assert code == 0, err
    assert_same(folder, runs)


def test_a_request_to_stop_saves_and_leaves(folder: Path, runs: Path) -> None:
    process = supervised(folder, runs)
    wait_for(lambda: beat(runs, 0)["step"] >= 7)
    process.send_signal(signal.SIGTERM)
    code, err = ended(process)
    assert code == 130, err
    assert max(CheckpointStore(runs / "tiny" / "checkpoints").steps()) >= 7
    assert ended(supervised(folder, runs))[0] == 0
    assert_same(folder, runs)


def test_a_mistake_is_not_tried_again(folder: Path, runs: Path) -> None:
    (next((runs / "tiny" / "data").rglob("*.bin"))).unlink()
    code, err = ended(supervised(folder, runs))
    assert code == 2, err
    assert "Traceback" not in err
    assert [incident["action"] for incident in incidents(runs)] == ["stop"]


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(folder: Path, runs: Path) -> None:
    code, err = ended(supervised(folder, runs, "--processes", "3"))
    assert code == 2, err
    assert not (runs / "tiny" / "logs" / "incidents.jsonl").exists()


def test_explain_says_who_and_what(folder: Path, runs: Path) -> None:
    assert "training ended" in finish(folder, "explain", str(folder / "runs" / "tiny"))
    process = supervised(folder, runs, "--restarts", "0")
    wait_for(lambda: beat(runs, 1)["step"] >= 3)
    pid = beat(runs, 1)["pid"]
    os.kill(pid, signal.SIGSEGV)
    ended(process)
    text = finish(folder, "explain", str(runs / "tiny"))
    assert f"rank 1 (process {pid} on" in text
    assert "SIGSEGV" in text
