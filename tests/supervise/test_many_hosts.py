"""Two hosts, on loopback addresses: whatever is killed, the run ends with the bits of one that nothing happened to."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from many_hosts import Job, assert_same, state, wait_for
from tiny_run import finish, write_tiny_recipe

STEPS = 200
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=5", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run `tiny`, and in `calm` one that two processes of one host trained without an incident."""
    folder = tmp_path_factory.mktemp("many")
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    shutil.copytree(folder / "runs", folder / "calm")
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    finish(folder, "supervise", "tiny.yaml", "--runs", "calm", "--processes", "2", *words)
    return folder


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def assert_calm(folder: Path, job: Job) -> None:
    assert [step for step, _ in job.steps()] == list(range(1, STEPS + 1))
    assert_same(state(folder / "calm" / "tiny", STEPS), job.state(STEPS))


def test_rank_0_the_coordinator_and_an_agent_are_killed_in_turn(folder: Path, runs: Path) -> None:
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        job.wait_for_step(8)
        job.kill_rank(0)
        job.wait_for_step(15, generation=2)
        coordinator = job.coordinator()
        os.kill(coordinator, signal.SIGKILL)
        wait_for(lambda: job.coordinator() not in (0, coordinator))
        wait_for(lambda: job.said("one").count("goes on") or job.generation() >= 3)
        before = job.generation()
        job.wait_for_step(25, generation=before)
        ranks = [job.beat(rank)["pid"] for rank in range(2)]
        job.agents["two"].kill()
        job.agents["two"].wait()
        job.start("two")
        assert [job.end(name) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        crash, *_, lost = job.incidents()
        assert (crash["kind"], crash["rank"], crash["code"], crash["action"]) == ("crash", 0, -9, "restart")
        assert crash["node"] in ("one", "two")
        assert (lost["kind"], lost["node"], lost["action"]) == ("lost", "two", "restart")
        assert job.generations()[-1] == {"one": 1, "two": 1}
        assert_calm(folder, job)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", ["a rank", "the agent of the store's host", "the coordinator's host", "the last agent"]
)
def test_whatever_is_killed_costs_nothing_but_time(folder: Path, runs: Path, victim: str) -> None:
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        job.wait_for_step(17)
        if victim == "a rank":
            job.kill_rank(1, signal.SIGSEGV)
        else:
            name = {"the coordinator's host": "one"}.get(victim, job.hosts()[0 if "store" in victim else -1])
            job.agents[name].kill()
            job.agents[name].wait()
            job.start(name)
        assert [job.end(name) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
        assert job.generation() >= 2
        assert_calm(folder, job)


@pytest.mark.slow
def test_a_host_that_is_asked_to_leave_lets_all_save_and_the_same_hosts_go_on_later(folder: Path, runs: Path) -> None:
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        job.wait_for_step(12)
        job.agents["two"].terminate()
        assert [job.end(name) for name in ("one", "two")] == [130, 130], job.said("one")[-3000:]
        saved = max(int(path.name[5:]) for path in (job.run / "checkpoints").glob("step-*"))
        assert saved >= 12
        assert saved == job.steps()[-1][0]  # of the last step, not of the last interval
        job.start("one", "two")
        assert [job.end(name) for name in ("one", "two")] == [0, 0], job.said("one")[-3000:]
        assert_calm(folder, job)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [("one", "two"), ("two",)])
def test_a_request_to_all_processes_of_hosts_lets_all_save(folder: Path, runs: Path, hosts: tuple[str, ...]) -> None:
    """As of systemd or a scheduler: agents, coordinator and ranks, all at once."""
    with Job(folder, runs, "2", SETTINGS) as job:
        job.start("one", "two")
        job.wait_for_step(12)
        pids = [job.agents[name].pid for name in hosts]
        pids += [job.beat(rank)["pid"] for rank, name in enumerate(job.hosts()) if name in hosts]
        for pid in [*pids, job.coordinator()] if "one" in hosts else pids:
            os.kill(pid, signal.SIGTERM)
        assert [job.end(name) for name in ("one", "two")] == [130, 130], job.said("one")[-3000:]
        saved = max(int(path.name[5:]) for path in (job.run / "checkpoints").glob("step-*"))
        assert saved == job.steps()[-1][0] < STEPS
        assert {row["kind"] for row in job.incidents()} <= {"preempted", "slow"}


@pytest.mark.slow
def test_a_host_that_fails_again_and_again_is_replaced_by_a_spare(folder: Path, runs: Path) -> None:
    with Job(folder, runs, "2", [*SETTINGS, "training.steps=300"]) as job:
        job.start("one", "two")
        job.wait_for_step(1)
        job.start("three")
        wait_for(lambda: "three is a spare" in job.said("three"))
        rank = job.hosts().index("two")
        for generation in (1, 2, 3):
            job.wait_for_step(3 + 20 * generation, generation, rank)
            job.kill_rank(rank)
            wait_for(lambda before=generation: job.generation() > before)
        assert job.generations()[-1] == {"one": 1, "three": 1}
        assert [incident["action"] for incident in job.incidents()] == ["restart", "restart", "replace"]
        assert "two is left out" in job.said("two")
        assert "two" in finish(folder, "explain", str(job.run))
        assert [job.end(name) for name in ("one", "two", "three")] == [0, 0, 0]
        assert [step for step, _ in job.steps()] == list(range(1, 301))


@pytest.mark.slow
def test_processes_of_an_agent_that_hangs_give_up_by_themselves(folder: Path, runs: Path) -> None:
    """One host trains, another is a spare. The agent stops; its process, which needs nobody, would train on."""
    with Job(folder, runs, "1", [*SETTINGS, "training.steps=2000", "checkpoint.save_interval=50"]) as job:
        job.start("one", "two")
        job.wait_for_step(20)
        (name,) = job.hosts()
        (spare,) = {"one", "two"} - {name}
        pid = job.beat(0)["pid"]
        wait_for(lambda: f"{spare} is a spare" in job.said(spare))
        os.kill(job.agents[name].pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", 60)
        text = (job.run / "logs" / "ranks" / "rank-00000.log").read_text()
        assert "was given up" in text
        job.wait_for_step(1, generation=2)
        assert job.hosts() == [spare]
        os.kill(job.agents[name].pid, signal.SIGCONT)
        assert [job.end(each) for each in ("one", "two")] == [0, 0], job.said("one")[-3000:]
        assert [step for step, _ in job.steps()] == list(range(1, 2001))
        assert job.incidents()[0]["kind"] == "lost"
