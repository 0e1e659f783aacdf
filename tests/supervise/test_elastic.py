"""Hosts leave, come, or die: the global batch and the order of samples stay as they are.

pytest -m slow tests/supervise/test_elastic.py
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from many_hosts import Job, state
from tiny_run import finish, write_tiny_recipe

from anychip.train.checkpoint import CheckpointStore

STEPS = 500
SETTINGS = [
    f"training.steps={STEPS}",
    "training.global_batch_size=12",
    "training.micro_batch_size=1",
    "training.eval_interval=0",
    "checkpoint.save_interval=0",
    "optimizer.name=adamw",
    "optimizer.lr=0.002",
]
LOSS_TOLERANCE = 0.02  # nats; from one step to the next the loss changes by about five times that


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, and in `calm` one that four processes trained without an incident."""
    folder = tmp_path_factory.mktemp("elastic")
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    shutil.copytree(folder / "runs", folder / "calm")
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    finish(folder, "supervise", "tiny.yaml", "--runs", "calm", "--processes", "4", *words, timeout=600)
    return folder


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def sizes(job: Job) -> list[int]:
    """Processes of the generations, equal neighbours once."""
    found = [sum(hosts.values()) for hosts in job.generations()]
    return [size for at, size in enumerate(found) if at == 0 or found[at - 1] != size]


def assert_same_samples(folder: Path, job: Job, equal: int) -> None:
    """Every batch once, in order; the first `equal` losses are the same bits, the others within what rounding does."""
    calm = Job(folder, folder / "calm", "4", SETTINGS).steps()
    assert [step for step, _ in job.steps()] == [step for step, _ in calm] == list(range(1, STEPS + 1))
    pairs = list(zip(calm, job.steps(), strict=True))
    assert all(one == other for one, other in pairs[:equal])  # four hosts are four processes of one
    worst = max(abs(one[1] - other[1]) for one, other in pairs)
    print(f"losses differ by at most {worst:.2e}, the last by {abs(pairs[-1][0][1] - pairs[-1][1][1]):.2e}")
    assert worst < LOSS_TOLERANCE, worst
    cursors = [
        CheckpointStore(run / "checkpoints").open(STEPS).extra["skipped"] for run in (folder / "calm/tiny", job.run)
    ]
    assert cursors[0] == cursors[1] == []
    assert state(job.run, STEPS).keys() == state(folder / "calm" / "tiny", STEPS).keys()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_of_four_hosts_go_on_without_the_one_that_was_killed(folder: Path, runs: Path) -> None:
    with Job(folder, runs, "2:4", [*SETTINGS, "checkpoint.save_interval=10"], "--settle", "2") as job:
        job.start("one", "two", "three", "four")
        job.wait_for_step(35)
        assert sizes(job) == [4]
        (rank,) = [at for at, name in enumerate(job.hosts()) if name == "four"]
        pid = job.beat(rank)["pid"]
        job.agents["four"].kill()
        job.agents["four"].wait()
        assert [job.end(name, 600) for name in ("one", "two", "three")] == [0, 0, 0], job.said("one")[-3000:]
        assert not Path(f"/proc/{pid}").exists()
        assert sizes(job) == [4, 3]
        assert "four" not in job.hosts()
        (lost,) = [row for row in job.incidents() if row["kind"] != "slow"]
        assert (lost["kind"], lost["node"]) == ("lost", "four")
        assert_same_samples(folder, job, 30)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_two_three_four_hosts_see_what_four_would(folder: Path, runs: Path) -> None:
    with Job(folder, runs, "2:4", SETTINGS, "--settle", "2") as job:
        job.start("one", "two", "three", "four")
        job.wait_for_step(30)
        first = job.generation()
        assert sum(job.generations()[-1].values()) == 4, job.generations()
        for name in ("three", "four"):
            job.agents[name].send_signal(signal.SIGTERM)
        assert [job.end(name) for name in ("three", "four")] == [130, 130]
        job.wait_for_step(40, generation=first + 1)
        job.start("three")
        job.wait_for_step(45, generation=first + 2)
        while len(job.hosts()) < 3:
            job.wait_for_step(45, generation=job.generation() + 1)
        job.start("four")
        job.wait_for_step(50, generation=job.generation() + 1)
        assert len(job.hosts()) == 4
        assert [job.end(name, 600) for name in ("one", "two", "three", "four")] == [0, 0, 0, 0], job.said("one")[-3000:]
        assert sizes(job) in ([4, 2, 3, 4], [4, 3, 2, 3, 4])
        assert_same_samples(folder, job, 30)
