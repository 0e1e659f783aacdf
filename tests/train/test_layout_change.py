"""A run that is stopped, cut differently over processes and started again goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import finish, write_tiny_recipe

LAYOUTS = [
    (2, ["parallel.tensor_parallel=2"]),
    (2, ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=1f1b"]),
    (4, ["parallel.data_parallel_shard=2", "parallel.data_parallel_replicate=2", "training.micro_batch_size=1"]),
    (1, []),
]


def torchrun(folder: Path, processes: int, *arguments: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "anychip", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses(run: Path) -> dict[int, float]:
    lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


@pytest.mark.timeout(900)
def test_each_part_of_a_run_under_another_layout_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml", "--runs", "one")
    finish(tmp_path, "data", "prepare", "tiny.yaml", "--runs", "many")
    finish(tmp_path, "train", "tiny.yaml", "--runs", "one")
    for number, (processes, settings) in enumerate(LAYOUTS):
        overrides = [word for setting in settings for word in ("--set", setting)]
        run_part(tmp_path, processes, overrides, stop_at=3 * (number + 1))
    one, many = losses(tmp_path / "one" / "tiny"), losses(tmp_path / "many" / "tiny")
    assert one.keys() == many.keys() == set(range(1, 13))
    for step, loss in one.items():
        assert abs(many[step] / loss - 1) < 1e-4, step


def run_part(folder: Path, processes: int, overrides: list[str], stop_at: int) -> None:
    """Train to the end, then forget what lies after `stop_at`: the next part starts from that checkpoint."""
    out = torchrun(folder, processes, "train", "tiny.yaml", "--runs", "many", *overrides)
    assert out.count("step 12/12 | loss") == 1
    run = folder / "many" / "tiny"
    for path in (run / "checkpoints").iterdir():
        if path.name.startswith("step-") and int(path.name.split("-")[1]) > stop_at:
            shutil.rmtree(path)
    if stop_at < 12:
        (run / "stages" / "train.json").unlink()
