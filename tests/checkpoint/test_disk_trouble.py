"""A disk that is full, broken, read-only or slow, and a writer that dies: training goes on, the last good checkpoint
stays, it is said, success is never claimed, and later saves work again.

Each kind through `anychip train`: `pytest -m slow tests/checkpoint/test_disk_trouble.py`."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_shim import CHANGES, FAIL, FLUSHES, FOR_EVER, READS, WRITES, DiskShim
from tiny_run import finish, write_tiny_recipe
from tiny_state import litter, newest, same, tiny_state

from anychip.train.checkpoint import CheckpointError, CheckpointStore
from anychip.train.checkpoint import save as save_module
from anychip.train.metrics import MetricsLog

MiB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def save_small_and_large(root: Path) -> str:
    """Save a small, two too large and a small state; returns what was said of the large ones."""
    store, small, large = CheckpointStore(root), torch.arange(1000), torch.zeros(3 * MiB)
    store.save(1, {"x": small}, {})
    with pytest.raises(CheckpointError) as blocking:
        store.save(2, {"x": large}, {})
    store.save_async(3, {"x": large}, {})
    with pytest.raises(CheckpointError) as background:
        store.wait()
    assert [path.name for path in root.iterdir()] == ["step-000001"]
    store.save(4, {"x": small}, {})
    assert store.steps() == [1, 4] and not litter(root)
    return f"{blocking.value}\n{background.value}"


def test_a_full_disk_is_an_error_message_and_the_next_save_works(small_disk: Path) -> None:
    assert save_small_and_large(small_disk / "checkpoints").count("No space left on device") == 2


def test_a_limit_on_file_sizes_is_an_error_message_and_the_next_save_works(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MiB, limits[1]))
    try:
        assert save_small_and_large(tmp_path / "checkpoints").count("File too large") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_after_a_failed_save_what_is_beyond_keep_makes_room(small_disk: Path) -> None:
    def state(step: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((MiB // 10,), float(step))}  # 0.4 MiB: the disk holds four

    store = CheckpointStore(small_disk / "checkpoints")
    for step in (1, 2, 3, 4):
        store.save(step, state(step), {})
    store = CheckpointStore(small_disk / "checkpoints", keep=2)
    with pytest.raises(CheckpointError, match="No space left"):
        store.save(5, state(5), {})
    assert store.steps() == [3, 4] and not litter(small_disk / "checkpoints")
    store.save_async(6, state(6), {})
    store.wait()
    assert store.steps() == [4, 6]


@pytest.mark.parametrize("death", [MemoryError(), SystemExit(1)], ids=repr)
def test_a_dying_writer_is_a_failed_save_and_the_next_one_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: BaseException
) -> None:
    def dies(*_: object) -> None:
        raise death

    store = CheckpointStore(tmp_path)
    store.save(1, tiny_state(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(save_module, "publish", dies)
        store.save_async(2, tiny_state(2), {})
        with pytest.raises(CheckpointError, match=r"step 2|step-000002"):
            store.wait()
    assert newest(tmp_path)[0] == 1 and not litter(tmp_path)
    store.save_async(3, tiny_state(3), {})
    store.wait()
    assert newest(tmp_path)[0] == 3 and same(newest(tmp_path)[1], tiny_state(3))


def test_rows_that_a_full_disk_does_not_take_are_written_when_it_is_back(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(small_disk / "logs", None, 0)
    log.write({"step": 1})
    (small_disk / "rest").write_bytes(bytes(2 * MiB - 16384))
    room = os.statvfs(small_disk)
    (small_disk / "more").write_bytes(bytes(room.f_bavail * room.f_frsize))
    for step in (2, 3):
        log.write({"step": step, "text": "x" * 5000})
    assert capsys.readouterr().err.count("No space left on device") == 1
    log.catch_up()
    assert steps_in(log) == [1]
    (small_disk / "rest").unlink()
    log.catch_up()
    assert steps_in(log) == [1, 2, 3]
    log.write({"step": 4})
    log.close()
    assert steps_in(log) == [1, 2, 3, 4]


def steps_in(log: MetricsLog) -> list[int]:
    """Of the whole rows: a full disk may have taken half of one."""
    lines = log.path.read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


TROUBLES: dict[str, dict[str, Any]] = {
    "disk full": {"error": errno.ENOSPC, "kinds": WRITES | FLUSHES | CHANGES},
    "quota": {"error": errno.EDQUOT, "kinds": WRITES | FLUSHES | CHANGES},
    "input/output errors": {"error": errno.EIO},
    "unreadable": {"error": errno.EIO, "kinds": READS},
    "read-only": {"error": errno.EROFS, "kinds": WRITES | CHANGES},
}
STEPS, INTERVAL = 30, 3


def train_with(folder: Path, environment: Mapping[str, str], recipe: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "anychip", "train", str(recipe), "--set", f"checkpoint.save_interval={INTERVAL}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr


@pytest.mark.parametrize(
    "trouble", [pytest.param(name, marks=[pytest.mark.slow] if n else []) for n, name in enumerate(TROUBLES)]
)
def test_training_goes_on_and_saves_again_when_the_disk_is_back(
    tmp_path: Path, shim: DiskShim, shimmed: Mapping[str, str], trouble: str
) -> None:
    """The disk fails from the first save on, three times: a save or more fail, later ones do not."""
    recipe = write_tiny_recipe(tmp_path, steps=STEPS, eval_interval=0)
    finish(tmp_path, "data", "prepare", str(recipe))
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    shim.arm(checkpoints, FAIL, at=20, until=FOR_EVER, most=3, **TROUBLES[trouble])
    said = train_with(tmp_path, shimmed, recipe)
    shim.disarm()
    warnings = [line for line in said.splitlines() if line.startswith("warning:") and "raining goes on" in line]
    reason = os.strerror(TROUBLES[trouble]["error"])
    assert shim.struck and warnings and all(reason in line or "cannot be" in line for line in warnings), said
    saved = CheckpointStore(checkpoints).steps()
    assert saved[-1] == STEPS and len(saved) + len(warnings) == STEPS // INTERVAL and not litter(checkpoints)
    for step in saved:
        CheckpointStore(checkpoints).open(step)


@pytest.mark.slow
def test_a_slow_disk_only_makes_saves_slow(tmp_path: Path, shim: DiskShim, shimmed: Mapping[str, str]) -> None:
    recipe = write_tiny_recipe(tmp_path, steps=STEPS, eval_interval=0)
    finish(tmp_path, "data", "prepare", str(recipe))
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    shim.arm(checkpoints, delay_us=20_000)
    said = train_with(tmp_path, shimmed, recipe)
    shim.disarm()
    assert "warning" not in said
    assert CheckpointStore(checkpoints).steps() == list(range(INTERVAL, STEPS + 1, INTERVAL))


@pytest.mark.slow
def test_a_run_whose_whole_disk_fills_up_goes_on_and_says_so(small_disk: Path) -> None:
    """Recipe, data, logs and checkpoints on 2 MiB; someone else's file makes way when half of the steps are done."""
    recipe = write_tiny_recipe(small_disk.parent, steps=400, eval_interval=0)
    finish(small_disk, "data", "prepare", str(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "anychip", "train", str(recipe), "--set", "checkpoint.keep=1",
         "--set", "checkpoint.save_interval=20"],
        cwd=small_disk, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 50/"):
            room = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))
        if line.startswith("step 250/"):
            (small_disk / "filler").unlink()
    assert process.wait(60) == 0, "".join(lines[-20:])
    said = "".join(lines)
    assert "No space left on device" in said and "step 400/400" in said
    assert newest(small_disk / "runs" / "tiny" / "checkpoints")[0] == 400
    log = (small_disk / "runs" / "tiny" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, log) if "loss" in row] == list(range(1, 401))
