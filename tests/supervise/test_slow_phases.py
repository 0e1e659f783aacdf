"""Evaluations, saves and growth that take long but get on are no hangs; the same with one process stuck are."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import finish, start, write_tiny_recipe

from anychip.supervise.watch import read_beat

HOOKS = Path(__file__).with_name("slow_phases")
QUIET = 8.0  # seconds; the pieces below take longer together
SETTINGS = {
    "evaluate": (1.3, ["training.steps=2", "training.eval_interval=0", "checkpoint.save_interval=0"]),
    "store": (0.4, ["training.steps=2", "training.eval_interval=1000", "checkpoint.save_interval=0"]),
    "grow": (0.08, ["training.eval_interval=1000", "checkpoint.save_interval=0"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared runs `tiny`, and `growing` which grows after its second step of four."""
    folder = tmp_path_factory.mktemp("slow")
    write_tiny_recipe(folder)
    path = write_tiny_recipe(folder, "growing", steps=4)
    recipe = yaml.safe_load(path.read_text())
    wider = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 128}
    recipe["grow"] = [{"at_tokens": 2 * 4 * 32, "to": wider}]
    path.write_text(yaml.safe_dump(recipe))
    finish(folder, "data", "prepare", "tiny.yaml")
    finish(folder, "data", "prepare", "growing.yaml")
    return folder


class Run:
    """A supervised run of two processes; `stuck` is the process that stands still in the phase."""

    def __init__(self, folder: Path, at: Path, phase: str, stuck: int | None, patch: pytest.MonkeyPatch) -> None:
        seconds, settings = SETTINGS[phase]
        name = "growing" if phase == "grow" else "tiny"
        shutil.copytree(folder / "runs" / name, at / "runs" / name)
        self.path, self._wish = at / "runs" / name, at / f"rank-{stuck}"
        if stuck is not None:
            self._wish.touch()
        patch.setenv("PYTHONPATH", f"{HOOKS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("SLOW_PHASE", phase)
        patch.setenv("SLOW", str(seconds))
        patch.setenv("STUCK", str(at))
        words = [word for setting in settings for word in ("--set", setting)]
        options = ["--processes", "2", "--quiet-seconds", str(QUIET), "--start-seconds", "120"]
        self._process = start(folder, "supervise", f"{name}.yaml", "--runs", str(at / "runs"), *options, *words)

    def incidents(self) -> list[dict[str, Any]]:
        log = self.path / "logs" / "incidents.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        return [row for row in rows if row["kind"] != "slow"]

    def hang(self) -> dict[str, Any]:
        """The incident that comes; the process is stuck no more then."""
        deadline = time.monotonic() + 150
        while not self.incidents():
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.02)
        self._wish.unlink()
        return self.incidents()[0]

    def end(self) -> None:
        _, err = self._process.communicate(timeout=200)
        assert self._process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["evaluate", "store", "grow"])
def test_a_long_phase_that_gets_on_is_no_hang(
    folder: Path, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder, tmp_path, phase, None, monkeypatch)
    seen: dict[str, tuple[float, float]] = {}
    while run._process.poll() is None:
        for path in (run.path / "logs" / "heartbeats").glob("generation-*/rank-00000"):
            beat = read_beat(path)
            if beat is not None and beat.phase == phase:
                first, _ = seen.get(phase, (beat.at, 0.0))
                seen[phase] = first, beat.at
        time.sleep(0.05)
    run.end()
    assert run.incidents() == []
    assert seen[phase][1] - seen[phase][0] > QUIET


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [("evaluate", 1), ("store", 1), ("grow", 0)])  # which makes the only file
def test_a_process_that_is_stuck_in_a_long_phase_is_found_and_named(
    folder: Path, tmp_path: Path, phase: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder, tmp_path, phase, rank, monkeypatch)
    hang = run.hang()
    run.end()
    assert (hang["kind"], hang["rank"], hang["phase"]) == ("hang", rank, phase)
    assert any("in slow" in frame for frame in hang["stack"][:3]), hang["stack"]
    assert 4.0 <= hang["seconds"] < QUIET + 3  # 3 for a machine that does other things
    assert len(run.incidents()) == 1
