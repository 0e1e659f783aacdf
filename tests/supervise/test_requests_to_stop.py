"""A run that is asked to stop does, whatever its processes are doing, and what it had saved is good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hosts import FakeAgent, Script, World
from many_hosts import wait_for
from tiny_run import prepare_and_run

from anychip.supervise.run import RunFailed
from anychip.train.checkpoint import CheckpointStore

STEPS, SAVED = 30, 10
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", f"checkpoint.save_interval={SAVED}"]
SETTINGS += ["checkpoint.keep=0"]
WORDS = ["supervise", "tiny.yaml", "--processes", "2", *(word for each in SETTINGS for word in ("--set", each))]
# Found on PYTHONPATH: a save after the first one does not come back in process 1, while the test leaves it so.
STUCK = f"""
import os, pathlib, time
if os.environ.get("RANK") == "1":
    from anychip.train.saves import Saves
    save = Saves.save
    def stuck(self, step, cursor, *, last):
        while step > {SAVED} and pathlib.Path(__file__).with_name("stuck").exists():
            time.sleep(0.02)
        save(self, step, cursor, last=last)
    Saves.save = stuck
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run that two processes trained in peace; `prepared` is how it was before."""
    return prepare_and_run(tmp_path_factory.mktemp("stop"), *WORDS)


def final(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    info = store.open(STEPS)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_stuck_in_a_save_are_killed_and_the_checkpoint_before_is_good(
    folder: Path, tmp_path: Path, twice: bool
) -> None:
    shutil.copytree(folder / "prepared", tmp_path / "runs")
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    (tmp_path / "stuck").touch()
    run, said = tmp_path / "runs" / "tiny", tmp_path / "said"
    words = [*WORDS, "--runs", str(tmp_path / "runs"), "--grace", "60" if twice else "2"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def supervise() -> subprocess.Popen[bytes]:
        with said.open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "anychip", *words], cwd=folder, stdout=log, stderr=log,
                                    env={**os.environ, "PYTHONPATH": paths})  # fmt: skip

    def beat() -> dict[str, Any]:
        try:
            path = run / "logs" / "heartbeats" / "generation-0001" / "rank-00001"
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return {"phase": "", "step": 0}

    process = supervise()
    try:
        wait_for(lambda: beat()["step"] > SAVED + 1)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: beat()["phase"] == "save" and beat()["step"] > SAVED + 1)
        asked = time.monotonic()
        if twice:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 130, said.read_text()
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - asked < 30  # a hang inside a save would be found after 120 s
    (incident,) = (
        row for row in map(json.loads, (run / "logs" / "incidents.jsonl").open()) if row["kind"] not in ("slow",)
    )
    assert incident["kind"] == ("preempted" if twice else "overdue")
    if not twice:
        assert (incident["rank"], incident["phase"]) == (1, "save")
        assert any("sitecustomize" in frame for frame in incident["stack"])
        assert "had not saved and left 2 s after it was asked to" in said.read_text()
    store = CheckpointStore(run / "checkpoints")
    newest = store.latest()
    assert newest is not None and newest.step == SAVED
    (tmp_path / "stuck").unlink()
    assert supervise().wait(timeout=200) == 0, said.read_text()
    expected, weights = final(folder / "runs" / "tiny"), final(run)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_hosts_whose_processes_do_not_leave_are_told_to_kill_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path, 1, 2)

    class Deaf(FakeAgent):
        def obey(self, message: dict[str, Any]) -> None:
            if message["kind"] != "signal":
                super().obey(message)

    for name in "ab":
        world.agents.append(Deaf(world, name))
    a, b = world.agents
    asked: list[float] = []

    def script() -> Script:
        yield world.running(a, b, number=1)
        asked.append(world.clock.now)
        world.stop.requests += 1
        yield lambda: False

    with pytest.raises(RunFailed, match="had not saved and left 60 s") as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert not a.generation and not b.generation
    assert 60 < world.clock.now - asked[0] < 70
