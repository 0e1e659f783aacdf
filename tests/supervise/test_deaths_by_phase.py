"""A process killed in each phase of a step and at each point of a save, on one host and on two: the run ends with the
bits of one that nothing happened to, and nothing of it is left behind.

    pytest -m slow tests/supervise/test_deaths_by_phase.py
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from leftovers import Leftovers
from many_hosts import Job, assert_same, rows, state, wait_for
from tiny_run import prepare_and_run, start

HOOKS = Path(__file__).with_name("injuries")
STEPS = 300
SETTINGS = [
    f"training.steps={STEPS}",
    "training.eval_interval=5",
    "checkpoint.save_interval=4",
    "checkpoint.keep=3",
]
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]
PHASES = ("data", "forward_backward", "reduce", "check", "optimizer", "log", "evaluate", "save")
SAVING = ("copy", "plan", "open", "write", "flush", "publish", "retain")
Spots = Sequence[tuple[str, int]]
SPOTS = [(spot, 0 if spot == "publish" else number % 2) for number, spot in enumerate(PHASES + SAVING)]
OTHERS = [(spot, 1 - rank) for spot, rank in SPOTS if spot != "publish"]  # which rank 0 alone does
EVERY_RANK = pytest.mark.parametrize("spots", [SPOTS, OTHERS], ids=["one rank", "the other"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, and what it ends with when nothing happens."""
    return prepare_and_run(tmp_path_factory.mktemp("deaths"), "supervise", "tiny.yaml", "--processes", "2", *WORDS)


@pytest.fixture
def runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", f"{HOOKS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("INJURIES", str(tmp_path))
    shutil.copytree(folder / "prepared", tmp_path / "runs")
    return tmp_path / "runs"


def die_everywhere(runs: Path, spots: Spots, left: Leftovers) -> Iterator[str]:
    """Ask for one death after the other; each must come and be noted before the next."""
    incidents = runs / "tiny" / "logs" / "incidents.jsonl"
    for number, (spot, rank) in enumerate(spots, start=1):
        wish = runs.parent / "wish"
        wish.write_text(f"die at {spot}")
        wish.rename(runs.parent / f"rank-{rank}")
        wait_for(lambda number=number: len(deaths(incidents)) >= number)
        left.look()
        yield spot


def deaths(incidents: Path) -> list[tuple[str, int, int | None]]:
    return [(row["kind"], row["rank"], row["code"]) for row in rows(incidents) if row["kind"] != "slow"]


def assert_nothing_lost(folder: Path, runs: Path) -> None:
    calm, rough = folder / "runs" / "tiny", runs / "tiny"
    assert_same(state(calm, STEPS), state(rough, STEPS))
    losses = [
        [(row["step"], row["loss"]) for row in rows(run / "logs" / "metrics.jsonl") if "loss" in row]
        for run in (calm, rough)
    ]
    assert losses[0] == losses[1]


def assert_end(folder: Path, runs: Path, spots: Spots, left: Leftovers) -> None:
    assert deaths(runs / "tiny" / "logs" / "incidents.jsonl") == [("crash", rank, -9) for _, rank in spots]
    assert_nothing_lost(folder, runs)
    assert left.found() == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
@EVERY_RANK
def test_on_one_host(folder: Path, runs: Path, spots: Spots) -> None:
    left = Leftovers(runs)
    process = start(folder, "supervise", "tiny.yaml", "--runs", str(runs), "--processes", "2", *WORDS)
    assert [*die_everywhere(runs, spots, left)] == [spot for spot, _ in spots]
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_end(folder, runs, spots, left)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@EVERY_RANK
def test_on_two_hosts(folder: Path, runs: Path, spots: Spots) -> None:
    left = Leftovers(runs)
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        assert [*die_everywhere(runs, spots, left)] == [spot for spot, _ in spots]
        assert [job.end(name, 600) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
    assert_end(folder, runs, spots, left)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("victim", ["the coordinator", "the agent of rank 0", "the agent of rank 1"])
def test_who_trains_nothing_dies_while_rank_0_is_at_each_spot(folder: Path, runs: Path, victim: str) -> None:
    """These processes have no phases of their own: rank 0 waits where it is until they are dead."""
    left = Leftovers(runs)
    waiting = runs.parent / "waiting"
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        for spot in PHASES + SAVING:
            wish = runs.parent / "wish"
            wish.write_text(f"wait at {spot}")
            wish.rename(runs.parent / "rank-0")
            wait_for(waiting.exists)
            left.look()
            kill(job, victim)
            waiting.unlink()
        assert [job.end(name, 600) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
    assert_nothing_lost(folder, runs)
    assert left.found() == []


def kill(job: Job, victim: str) -> None:
    """Kill it and start it again: agents do that with a coordinator themselves."""
    if victim == "the coordinator":
        coordinator = job.coordinator()
        os.kill(coordinator, signal.SIGKILL)
        wait_for(lambda: job.coordinator() not in (0, coordinator))
        return
    name = job.hosts()[int(victim[-1])]
    job.agents[name].kill()
    job.agents[name].wait()
    job.start(name)
