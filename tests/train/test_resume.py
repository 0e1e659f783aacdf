"""Training that was killed or stopped continues bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import finish, prepare_and_run, start

from anychip.train.checkpoint import CheckpointStore


def final_state(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    newest = store.latest()
    assert newest is not None and newest.step == 12
    return dict(store.read(newest))


def metric_rows(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run `tiny` that was trained without interruption."""
    return prepare_and_run(tmp_path_factory.mktemp("resume"), "train", "tiny.yaml")


def assert_same_as_uninterrupted(folder: Path, runs: Path) -> None:
    expected, actual = final_state(folder / "runs" / "tiny"), final_state(runs / "tiny")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), actual[name].view(-1).view(torch.uint8)), name
    assert metric_rows(folder / "runs" / "tiny") == metric_rows(runs / "tiny")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_points_it_ends_with_the_same_bits(folder: Path, tmp_path: Path, seed: int) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    chance = random.Random(seed)
    for _ in range(3):
        process = start(folder, "train", "tiny.yaml", "--runs", str(runs))
        assert process.stdout is not None
        for _ in range(chance.randrange(2, 7)):  # some steps on, then anywhere inside the next ones
            if not process.stdout.readline():
                break
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
    finish(folder, "train", "tiny.yaml", "--runs", str(runs))
    assert_same_as_uninterrupted(folder, runs)


def test_sigterm_saves_where_it_stands_and_continues_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    process = start(folder, "train", "tiny.yaml", "--runs", str(runs))
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 4/"):
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved" in err and "Traceback" not in err
    stopped_at = CheckpointStore(runs / "tiny" / "checkpoints").steps()[-1]
    assert 4 <= stopped_at < 12
    finish(folder, "train", "tiny.yaml", "--runs", str(runs))
    assert_same_as_uninterrupted(folder, runs)


def test_another_recipe_under_the_same_name_is_refused(folder: Path) -> None:
    process = start(folder, "train", "tiny.yaml", "--set", "optimizer.lr=0.5")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "optimizer.lr" in err and "Traceback" not in err


def test_a_finished_stage_is_not_run_again(folder: Path) -> None:
    assert "train: done before" in finish(folder, "train", "tiny.yaml")


def test_numbers_that_are_no_numbers_stop_the_run_before_the_optimizer(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    process = start(folder, "train", "tiny.yaml", "--runs", str(runs), "--set", "optimizer.lr=1e30")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "first bad tensor" in err and "Traceback" not in err


def test_torchrun_with_two_processes_trains_the_same_model(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", "-m", "anychip", "train", "tiny.yaml", "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("step 12/12 | loss") == 1  # one process speaks
    for name, tensor in final_state(folder / "runs" / "tiny").items():
        torch.testing.assert_close(final_state(runs / "tiny")[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
