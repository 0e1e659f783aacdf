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
# Found on PYTHONPATH: METHOD of Saves, but for the first save, does not come back in RANKS while the test leaves it so.
STUCK = f"""
import os, pathlib, time
if os.environ.get("RANK") in RANKS:
    from anychip.train.saves import Saves
    method = Saves.METHOD
    def stuck(self, step={STEPS}, *values, **more):
        while step > {SAVED} and pathlib.Path(__file__).with_name("stuck").exists():
            time.sleep(0.02)
        method(self, *([step, *values] if values else []), **more)
    Saves.METHOD = stuck
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run that two processes trained in peace; `prepared` is how it was before."""
    return prepare_and_run(tmp_path_factory.mktemp("stop"), *WORDS)


class Supervised:
    """A supervised run of what is prepared in `folder`, whose processes `ranks` are stuck in `method` while `stuck`
    exists."""

    def __init__(self, folder: Path, here: Path, method: str, ranks: str, *more: str) -> None:
        shutil.copytree(folder / "prepared", here / "runs")
        (here / "sitecustomize.py").write_text(STUCK.replace("METHOD", method).replace("RANKS", repr(ranks)))
        self.stuck, self.run, self.log = here / "stuck", here / "runs" / "tiny", here / "said"
        self.stuck.touch()
        self._folder, self._words = folder, [*WORDS, "--runs", str(here / "runs"), *more]
        self._paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "anychip", *self._words], cwd=self._folder, stdout=log,
                                    stderr=log, env={**os.environ, "PYTHONPATH": self._paths})  # fmt: skip

    def beat(self, rank: int) -> dict[str, Any]:
        try:
            path = self.run / "logs" / "heartbeats" / "generation-0001" / f"rank-{rank:05d}"
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            return {"phase": "", "step": 0}

    def said(self) -> str:
        return self.log.read_text()

    def incident(self) -> dict[str, Any]:
        """The only one, but for those of slow processes, which a busy machine makes."""
        rows = map(json.loads, (self.run / "logs" / "incidents.jsonl").open())
        (incident,) = (row for row in rows if row["kind"] != "slow")
        return dict(incident)

    def saved(self) -> int:
        newest = CheckpointStore(self.run / "checkpoints").latest()
        assert newest is not None
        return newest.step


def final(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    info = store.open(STEPS)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_stuck_in_a_save_are_killed_and_the_checkpoint_before_is_good(
    folder: Path, tmp_path: Path, twice: bool
) -> None:
    supervised = Supervised(folder, tmp_path, "save", "1", "--grace", "60" if twice else "2")
    process = supervised.start()
    try:
        wait_for(lambda: supervised.beat(1)["step"] > SAVED + 1)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: supervised.beat(1)["phase"] == "save" and supervised.beat(1)["step"] > SAVED + 1)
        asked = time.monotonic()
        if twice:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 130, supervised.said()
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - asked < 30  # a hang inside a save would be found after 120 s
    incident = supervised.incident()
    assert incident["kind"] == ("preempted" if twice else "overdue")
    if twice:
        assert incident["code"] == -signal.SIGKILL
        assert "stopped by force before all had saved" in supervised.said()
    else:
        assert (incident["rank"], incident["phase"]) == (1, "save")
        assert any("sitecustomize" in frame for frame in incident["stack"])
        assert "had not saved and left 2 s after it was asked to" in supervised.said()
    assert supervised.saved() == SAVED
    supervised.stuck.unlink()
    assert supervised.start().wait(timeout=200) == 0, supervised.said()
    expected, weights = final(folder / "runs" / "tiny"), final(supervised.run)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.mark.parametrize("method", ["save", "leave"])
def test_one_request_to_the_supervisor_and_its_processes_saves_whoever_hears_it_first(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """As systemd sends it to a control group: what the supervisor passes on is no second request."""
    supervised = Supervised(folder, tmp_path, method, "01")
    process = supervised.start()
    try:
        wait_for(lambda: min(supervised.beat(rank)["step"] for rank in (0, 1)) > SAVED + 1)
        for rank in (0, 1):
            os.kill(supervised.beat(rank)["pid"], signal.SIGTERM)
        wait_for(lambda: {supervised.beat(rank)["phase"] for rank in (0, 1)} == {method})
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # in which it is passed on
        supervised.stuck.unlink()
        assert process.wait(timeout=100) == 130, supervised.said()
    finally:
        process.kill()
        process.wait()
    incident = supervised.incident()
    assert (incident["kind"], incident["code"], incident["step"]) == ("preempted", 130, supervised.saved())


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
        world.stop.signals += 1
        yield lambda: False

    with pytest.raises(RunFailed, match="had not saved and left 60 s") as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert not a.generation and not b.generation
    assert 60 < world.clock.now - asked[0] < 70
