"""The wall clocks of two hosts jump by an hour, forth and back, while they train: nothing happens."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from many_hosts import Job, assert_same, state
from tiny_run import finish, write_tiny_recipe

STEPS = 200
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=20"]
HOUR = 3600


class WallClock:
    """Its offset, for all processes with `environment`."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or sys.platform != "linux":
            pytest.skip("no C compiler here")
        library, page = folder / "clock_shim.so", folder / "offset"
        source = Path(__file__).with_name("clock_shim.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=100)
        page.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIM": str(page)}
        with page.open("r+b") as handle:
            self._page = mmap.mmap(handle.fileno(), 8)

    def jump(self, seconds: int) -> None:
        """To so many seconds from the true time."""
        self._page[:8] = struct.pack("q", seconds)


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def test_the_shim_moves_the_wall_clock_alone(clock: WallClock) -> None:
    clock.jump(HOUR)
    program = "import time; print(time.time(), time.monotonic())"
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, env={**os.environ, **clock.environment}, capture_output=True, check=True).stdout
    wall, monotonic = map(float, said.split())
    assert HOUR - 60 < wall - time.time() < HOUR + 60
    assert abs(monotonic - time.monotonic()) < 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_hang_is_seen_and_no_lease_is_lost(
    tmp_path: Path, clock: WallClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    shutil.copytree(tmp_path / "runs", tmp_path / "calm")
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    finish(tmp_path, "supervise", "tiny.yaml", "--runs", "calm", "--processes", "2", *words)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    with Job(tmp_path, tmp_path / "runs", "2", SETTINGS) as job:
        job.start("one", "two")
        for step, seconds in [(10, HOUR), (40, 0), (70, -HOUR), (100, 0), (130, 24 * HOUR), (160, -24 * HOUR)]:
            job.wait_for_step(step)
            clock.jump(seconds)
        assert [job.end(name) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
        assert job.generation() == 1
        assert [row for row in job.incidents() if row["kind"] != "slow"] == []
        assert_same(state(tmp_path / "calm" / "tiny", STEPS), job.state(STEPS))
