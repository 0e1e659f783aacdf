"""Processes that hang in every way there is are found, and the right one is named, with what it was doing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import finish, start, write_tiny_recipe

from anychip.rundir import RunDirectory
from anychip.supervise.processes import Generation, Place, open_store, train_command
from anychip.supervise.watch import Hang, Watch

LAYOUTS = {
    "data": ["parallel.data_parallel_replicate=2"],
    "shard": ["parallel.data_parallel_shard=2"],
    "tensor": ["parallel.tensor_parallel=2"],
    "pipeline": ["parallel.pipeline_parallel=2"],
}
# What a process did last before it computes the loss in each layout; 1 is the last stage of a pipeline.
LAST = {
    "data": ("all_reduce", "replicate 2"),
    "shard": ("all_gather", "shard 2"),
    "tensor": ("reduce_scatter", "tensor 2"),
    "pipeline": ("recv", "pipeline 2"),
}
SETTINGS = ["training.steps=100000", "training.eval_interval=0", "checkpoint.save_interval=0"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    return folder


class Training:
    """Two processes, watched; `hurt` is the folder that injuries are asked for in."""

    def __init__(self, folder: Path, hurt: Path, layout: str) -> None:
        shutil.copytree(folder / "runs", hurt / "runs")
        words = [word for setting in SETTINGS + LAYOUTS[layout] for word in ("--set", setting)]
        command = train_command([str(folder / "tiny.yaml"), "--runs", str(hurt / "runs"), *words])
        self._hurt = hurt
        os.mkfifo(hurt / "gate")
        self._store, port = open_store("127.0.0.1")
        place = Place([0, 1], 0, 2, 0, 1, "127.0.0.1", port, "watch")
        self.generation = Generation(1, place, command, RunDirectory(hurt / "runs" / "tiny"))
        self.watch = Watch(self.generation)

    def reach(self, step: int, seconds: float = 120.0) -> None:
        """Until both processes have come this far."""
        deadline = time.monotonic() + seconds
        while len(beats := self.generation.beats()) < 2 or min(beat.step for beat in beats) < step:
            assert self.generation.death() is None, self.generation.last_lines(0)
            assert time.monotonic() < deadline
            self.watch.silence()  # so it learns how long steps take
            time.sleep(0.02)

    def more_steps(self, steps: int) -> None:
        """Watch anew: a supervisor does after every hang, and one that lived through it would take it for a step."""
        reached = max((beat.step for beat in self.generation.beats()), default=0)
        self.reach(reached + 2)
        self.watch = Watch(self.generation)
        self.reach(reached + 2 + steps)

    def ask(self, rank: int, injury: str) -> None:
        """Put the wish there at once; "" takes it back."""
        wish = self._hurt / f"rank-{rank}"
        if not injury:
            ended = wish.read_text()
            wish.unlink()
            if ended == "lock":
                (self._hurt / "gate").write_text("\n")
            return
        (self._hurt / "wish").write_text(injury)
        (self._hurt / "wish").rename(wish)

    def hang(self) -> tuple[Hang, float]:
        """The hang that is found, and the seconds that it took."""
        started = time.monotonic()
        while (silence := self.watch.silence()) is None:
            assert self.generation.death() is None, self.generation.last_lines(1)
            assert time.monotonic() < started + 60
            time.sleep(0.02)
        return self.watch.hang(silence), time.monotonic() - started


@contextmanager
def training(folder: Path, hurt: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    hooks = Path(__file__).with_name("injuries")
    monkeypatch.setenv("PYTHONPATH", f"{hooks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("INJURIES", str(hurt))
    processes = Training(folder, hurt, layout)
    try:
        yield processes
    finally:
        processes.generation.kill()


def assert_in_time(seconds: float) -> None:
    """The bar is 5 s (steps here are shorter than 1 s); half of it again for a machine that does other things."""
    assert seconds < 7.5


@pytest.mark.parametrize(
    "layout", ["pipeline", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("data", "shard", "tensor"))]
)
def test_every_kind_of_hang_is_found_and_named(
    prepared: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(prepared, tmp_path, layout, monkeypatch) as processes:
        for injury, frame in (("lock", "_hold_the_interpreter"), ("loop", "_loop")):
            processes.more_steps(6)
            processes.ask(1, injury)
            hang, seconds = processes.hang()
            assert (hang.beat.rank, hang.beat.phase) == (1, "forward_backward")
            assert any(frame in line for line in hang.stack), hang.stack
            assert any("run_training" in line for line in hang.stack)
            operation, group = LAST[layout]
            assert hang.collective.startswith(f"{operation} number ") and f"({group})" in hang.collective
            assert hang.collective.endswith("which was over for it")
            assert_in_time(seconds)
            processes.ask(1, "")

        processes.more_steps(6)
        processes.ask(0, "read")
        hang, seconds = processes.hang()
        assert (hang.beat.rank, hang.beat.phase) == (0, "data")
        assert any("injured_tokens" in line for line in hang.stack), hang.stack
        assert "which the training thread waits for:" in hang.stack
        assert any("run_training" in line for line in hang.stack)
        assert_in_time(seconds)
        processes.ask(0, "")

        processes.more_steps(6)
        os.kill(processes.generation.pid(1), signal.SIGSTOP)
        hang, seconds = processes.hang()  # which wakes it
        assert (hang.beat.rank, hang.state) == (1, "T")
        assert hang.collective and any("run_training" in line for line in hang.stack)
        assert_in_time(seconds)


def incidents(run: Path) -> list[dict[str, object]]:
    path = run / "logs" / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.slow
def test_a_slow_process_is_named_once_and_explained(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = Path(__file__).with_name("injuries")
    monkeypatch.setenv("PYTHONPATH", f"{hooks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("INJURIES", str(tmp_path))
    shutil.copytree(prepared / "runs", tmp_path / "runs")
    (tmp_path / "rank-1").write_text("sleep")
    words = [word for setting in [*SETTINGS, "training.steps=40"] for word in ("--set", setting)]
    runs = str(tmp_path / "runs")
    process = start(prepared, "supervise", "tiny.yaml", "--runs", runs, "--processes", "2", *words)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (slow,) = incidents(tmp_path / "runs" / "tiny")
    assert (slow["kind"], slow["rank"], slow["phase"], slow["action"]) == ("slow", 1, "forward_backward", "none")
    since, step = int(str(slow["since"])), int(str(slow["step"]))
    assert 4 <= since <= step <= since + 8  # since + 4 but for a machine that slows the other one down as well
    assert err.count("times as long as its fellows") == 1
    assert "Slow: " in finish(prepared, "explain", str(tmp_path / "runs" / "tiny"))
