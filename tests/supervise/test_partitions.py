"""A host is cut off, with the run directory still in reach: it stops before another takes over, and comes back."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from many_hosts import Job, wait_for
from tiny_run import finish, write_tiny_recipe

from anychip.supervise.watch import read_beat

STEPS = 800
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=20", "checkpoint.keep=0"]
NETWORKS = """
mount -t tmpfs none /run
ip netns add host0; ip netns add host1
ip link add fabric0 netns host0 type veth peer name fabric0 netns host1
for n in 0 1; do
    ip -n host$n address add 10.77.0.$((n + 1))/24 dev fabric0
    ip -n host$n link set fabric0 up; ip -n host$n link set lo up
done
echo ready
"""
# Frames to an address that nobody has are lost without an error, one way only.
CUTS = {
    "link down": ("ip -n host1 link set fabric0 down", "ip -n host1 link set fabric0 up"),
    "nothing reaches the coordinator": (
        "ip -n host1 neigh replace 10.77.0.1 lladdr 02:00:00:00:00:99 dev fabric0 nud permanent",
        "ip -n host1 neigh del 10.77.0.1 dev fabric0",
    ),
    "nothing comes from the coordinator": (
        "ip -n host0 neigh replace 10.77.0.2 lladdr 02:00:00:00:00:99 dev fabric0 nud permanent",
        "ip -n host0 neigh del 10.77.0.2 dev fabric0",
    ),
}


class Networks:
    """Two network namespaces that a virtual cable joins, and a shell that may do anything in them; they die with it."""

    def __init__(self) -> None:
        spaces = ["--user", "--map-root-user", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._shell = subprocess.Popen(
            ["unshare", *spaces, "bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def do(self, command: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(command + "\n")
        self._shell.stdin.flush()

    def open(self) -> str:
        """An error text when this is not allowed here."""
        self.do(f"set -e{NETWORKS}set +e")
        assert self._shell.stdout is not None and self._shell.stderr is not None
        return "" if self._shell.stdout.readline() == "ready\n" else self._shell.stderr.read()[:200] or "no shell"

    def start(self, host: int, folder: Path, log: Path, words: list[str]) -> None:
        command = shlex.join(["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "anychip", *words])
        inside = (
            f"cd {shlex.quote(str(folder))}; {command} </dev/null >>{shlex.quote(str(log))} 2>&1; echo ended $? >>{log}"
        )
        self.do(f"nsenter --net=/run/netns/host{host} bash -c {shlex.quote(inside)} &")

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()


@pytest.fixture
def networks() -> Iterator[Networks]:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("unshare, nsenter and ip are not installed")
    networks = Networks()
    try:
        if problem := networks.open():
            pytest.skip(f"network namespaces are not allowed here: {problem}")
        yield networks
    finally:
        networks.close()


def wait_for_step(job: Job, step: int, generation: int = 1) -> None:
    """Whether its process lives cannot be asked: the number that it knows itself by is of another namespace."""
    wait_for(lambda: job.generation() >= generation and job.beat(0)["step"] >= step)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cut", CUTS)
def test_a_host_that_is_cut_off_stops_writes_nothing_and_comes_back(
    networks: Networks, tmp_path: Path, cut: str
) -> None:
    """One host trains, alone: it needs nobody, reaches the run directory, and would train on. The other is a spare."""
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    job = Job(tmp_path, tmp_path / "runs", "1", SETTINGS)
    words = [word.replace("127.0.0.1", "10.77.0.1") for word in job.words]
    logs = {name: tmp_path / f"{name}.log" for name in ("coordinator", "far", "near")}
    networks.start(0, tmp_path, logs["coordinator"], [*words, "--coordinate"])
    networks.start(1, tmp_path, logs["far"], [*words, "--interface", "fabric0", "--node-name", "far"])
    wait_for_step(job, 25)
    assert job.hosts() == ["far"]
    networks.start(0, tmp_path, logs["near"], [*words, "--interface", "fabric0", "--node-name", "near"])
    wait_for(lambda: logs["near"].exists() and "near is a spare" in logs["near"].read_text())
    networks.do(CUTS[cut][0])
    wait_for(lambda: job.generation() == 2)
    taken_over = time.monotonic()
    far = job.run / "logs" / "heartbeats" / "generation-0001" / "rank-00000"
    last = read_beat(far)
    assert last is not None
    assert last.at < taken_over
    wait_for_step(job, last.step + 20, generation=2)
    assert read_beat(far) == last, "it went on"
    assert job.hosts() == ["near"]
    assert job.incidents()[0]["kind"] == "lost"
    if cut != "nothing reaches the coordinator":  # then it may hear that it is to end before its lease does
        assert "no coordinator within the lease" in logs["far"].read_text()
    networks.do(CUTS[cut][1])
    wait_for(lambda: "ended 0" in logs["coordinator"].read_text(), 300)
    wait_for(lambda: all("ended 0" in log.read_text() for log in logs.values()), 60)  # far too: it was there again
    assert [step for step, _ in job.steps()] == list(range(1, STEPS + 1))
