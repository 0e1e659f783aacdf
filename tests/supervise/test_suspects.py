"""A chip that computes wrongly, with three to judge it: it is named and left out, and training goes on without it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_run import finish, start, write_tiny_recipe

SETTINGS = [
    "training.steps=20",
    "training.global_batch_size=12",
    "training.eval_interval=0",
    "guard.replay_interval=1",
    "guard.patience=2",
]
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared run whose rank 2 is to compute wrongly."""
    hooks = Path(__file__).with_name("injuries")
    monkeypatch.setenv("PYTHONPATH", f"{hooks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("INJURIES", str(tmp_path))
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    (tmp_path / "rank-2").write_text("wrong")
    return tmp_path


@pytest.mark.parametrize("least", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_is_left_out_where_fewer_will_do_and_stops_the_run_where_not(folder: Path, least: int) -> None:
    options = ["--processes", "3", "--min-processes", str(least)]
    process = start(folder, "supervise", "tiny.yaml", *options, *WORDS)
    _, err = process.communicate(timeout=200)
    run = folder / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "logs" / "incidents.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["rank"]) for row in rows] == [("suspect", 2)], err
    assert "rank 2 was suspected" in rows[0]["detail"][-1]
    if least == 3:
        assert process.returncode == 3 and rows[0]["action"] == "stop"
        assert "anychip probe" in finish(folder, "explain", str(run))
        return
    assert process.returncode == 0 and rows[0]["action"] == "shrink", err
    steps = [json.loads(line)["step"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 20
