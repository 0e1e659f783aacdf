"""Copies in the host's memory outlive the process, save reading the disk, and never come back elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_run import finish, start, write_tiny_recipe

from anychip.train.checkpoint import CheckpointStore

EVERY_STEP = [
    word
    for setting in ("checkpoint.memory_interval=1", "checkpoint.save_interval=0", "training.steps=60")
    for word in ("--set", setting)
]
COPIES = "anychip-copies-*"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv("ANYCHIP_MEMORY_FOLDER", str(folder))
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    return folder


def killed_after(folder: Path, memory: Path, copies: int) -> int:
    """Train until so many copies were made, kill, and return the newest step that is left in memory."""
    process = start(folder, "train", "tiny.yaml", *EVERY_STEP)
    deadline, newest = time.monotonic() + 120, 0
    while time.monotonic() < deadline and newest < copies:
        newest = max((int(p.parent.name[5:]) for p in memory.glob(f"{COPIES}/step-*/COMPLETE")), default=0)
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return newest


def final(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    newest = store.latest()
    assert newest is not None and newest.step == 60
    return {name: tensor.clone() for name, tensor in store.read(newest, newest.tensors)}


def first_step(run: Path, out: str) -> int:
    return int(next(line for line in out.splitlines() if line.startswith("step ")).split("/")[0].split()[1])


def test_a_killed_run_goes_on_from_memory_with_the_same_bits(tmp_path: Path, memory: Path) -> None:
    reached = killed_after(tmp_path, memory, 5)
    run = tmp_path / "runs" / "tiny"
    assert CheckpointStore(run / "checkpoints").steps() == []
    out = finish(tmp_path, "train", "tiny.yaml", *EVERY_STEP)
    assert first_step(run, out) > reached
    assert list(memory.iterdir()) == [] and not (run / "memory.json").exists()
    found = final(run)
    shutil.rmtree(run / "checkpoints")
    (run / "stages" / "train.json").unlink(missing_ok=True)
    finish(tmp_path, "train", "tiny.yaml", *EVERY_STEP)
    expected = final(run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_damaged_copy_is_passed_over(tmp_path: Path, memory: Path) -> None:
    killed_after(tmp_path, memory, 3)
    for path in memory.glob(f"{COPIES}/step-*/rank-*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    process = start(tmp_path, "train", "tiny.yaml", *EVERY_STEP)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "copies in memory are passed over" in err
    assert first_step(tmp_path / "runs" / "tiny", out) == 1


def test_a_new_run_of_the_same_name_never_finds_them(tmp_path: Path, memory: Path) -> None:
    killed_after(tmp_path, memory, 3)
    shutil.rmtree(tmp_path / "runs")
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    out = finish(tmp_path, "train", "tiny.yaml", *EVERY_STEP)
    assert first_step(tmp_path / "runs" / "tiny", out) == 1
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc", "PARENT", "nonsense\u0000", 3])
def test_a_record_never_leads_elsewhere(tmp_path: Path, memory: Path, path: object) -> None:
    precious = tmp_path / "anychip-copies-precious"
    precious.mkdir()
    (precious / "owner.json").write_text(json.dumps({"run": str(tmp_path / "runs" / "tiny")}))
    record = tmp_path / "runs" / "tiny" / "memory.json"
    record.write_text(json.dumps({"path": str(precious) if path == "PARENT" else path}))
    finish(tmp_path, "train", "tiny.yaml", "--set", "checkpoint.memory_interval=5")
    assert precious.is_dir()
