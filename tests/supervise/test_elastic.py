"""Hosts leave and come: the global batch and the order of samples stay as they are."""

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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_two_three_four_hosts_see_what_four_would(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    shutil.copytree(tmp_path / "runs", tmp_path / "calm")
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    finish(tmp_path, "supervise", "tiny.yaml", "--runs", "calm", "--processes", "4", *words, timeout=600)
    with Job(tmp_path, tmp_path / "runs", "2:4", SETTINGS, "--settle", "2") as job:
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
        sizes = [sum(hosts.values()) for hosts in job.generations()]
        assert [size for at, size in enumerate(sizes) if at == 0 or sizes[at - 1] != size] in (
            [4, 2, 3, 4],
            [4, 3, 2, 3, 4],
        )
        calm = Job(tmp_path, tmp_path / "calm", "4", SETTINGS).steps()
        assert [step for step, _ in job.steps()] == [step for step, _ in calm] == list(range(1, STEPS + 1))
        pairs = list(zip(calm, job.steps(), strict=True))
        assert all(one == other for one, other in pairs[:30])  # four hosts are four processes of one
        worst = max(abs(one[1] - other[1]) for one, other in pairs)
        print(f"losses differ by at most {worst:.2e}, the last by {abs(pairs[-1][0][1] - pairs[-1][1][1]):.2e}")
        assert worst < LOSS_TOLERANCE, worst
        stores = [CheckpointStore(tmp_path / runs / "tiny" / "checkpoints") for runs in ("calm", "runs")]
        cursors = [store.open(STEPS).extra["skipped"] for store in stores]
        assert cursors[0] == cursors[1] == []
        assert state(job.run, STEPS).keys() == state(tmp_path / "calm" / "tiny", STEPS).keys()
