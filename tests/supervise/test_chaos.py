"""Thirty faults, and nothing to be seen of them in what comes out. A thousand: see the page on recovery."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import finish, write_tiny_recipe

from anychip.supervise.chaos import KINDS, schedule


def test_a_seed_is_a_schedule() -> None:
    assert schedule(7, 50, 4) == schedule(7, 50, 4) != schedule(8, 50, 4)
    assert {fault.kind for fault in schedule(7, 200, 4)} == set(KINDS)
    assert {fault.rank for fault in schedule(7, 200, 4)} == set(range(4))


@pytest.mark.timeout(900)
def test_thirty_faults_leave_no_trace(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path)
    settings = [
        "training.steps=200",
        "training.eval_interval=0",
        "checkpoint.save_interval=3",
        "checkpoint.keep=4",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    out = finish(tmp_path, "chaos", "tiny.yaml", "--seed", "5", "--faults", "30", *words, timeout=850)
    assert "Every invariant held" in out
    assert "30 of 30 faults struck" in out
