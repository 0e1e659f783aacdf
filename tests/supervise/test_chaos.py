"""Faults of every kind, and nothing to be seen of them in what comes out. A thousand: see the page on recovery."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import finish, write_tiny_recipe

from anychip.supervise.chaos.schedule import kinds, schedule

SETTINGS = ["training.eval_interval=0", "checkpoint.save_interval=3", "checkpoint.keep=4"]


def test_a_seed_is_a_schedule() -> None:
    weights = kinds(2, networks=True)
    assert schedule(7, 50, 4, weights) == schedule(7, 50, 4, weights) != schedule(8, 50, 4, weights)
    assert {fault.rank for fault in schedule(7, 200, 4, weights)} == set(range(4))


@pytest.mark.parametrize(("hosts", "networks"), [(1, False), (2, False), (2, True)])
def test_every_kind_strikes(hosts: int, networks: bool) -> None:
    weights = kinds(hosts, networks)
    assert {fault.kind for fault in schedule(3, len(weights), 4, weights)} == set(weights)


def test_kinds_need_what_they_strike() -> None:
    assert "kill_agent" not in kinds(1, networks=False)
    assert "kill_supervisor" not in kinds(2, networks=True)
    assert ("partition" in kinds(2, networks=False), "partition" in kinds(2, networks=True)) == (False, True)


def run(folder: Path, *options: str, steps: int) -> str:
    write_tiny_recipe(folder)
    words = [word for setting in [*SETTINGS, f"training.steps={steps}"] for word in ("--set", setting)]
    return finish(folder, "chaos", "tiny.yaml", *options, *words, timeout=850)


@pytest.mark.timeout(900)
def test_thirty_faults_leave_no_trace(tmp_path: Path) -> None:
    """Every kind of one host among them."""
    out = run(tmp_path, "--seed", "5", "--faults", "30", steps=800)
    assert "Every invariant held" in out
    assert "30 of 30 faults struck" in out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_on_two_hosts_leave_no_trace(tmp_path: Path) -> None:
    out = run(tmp_path, "--hosts", "2", "--faults", "12", steps=400)
    assert "Every invariant held" in out
