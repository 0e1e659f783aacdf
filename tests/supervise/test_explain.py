"""What is left of a run becomes sentences: which rank, which node, what, since when, what to do."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import write_tiny_recipe

from anychip.parallel.messages import Message
from anychip.recipe import load_recipe
from anychip.rundir import RunDirectory
from anychip.supervise.explain import explain
from anychip.supervise.incidents import LOG_NAME, Incident, IncidentLog, read_incidents, slow_incident
from anychip.supervise.processes import heartbeat_folder, heartbeat_folders, next_number
from anychip.supervise.stragglers import Slow
from anychip.train.heartbeat_page import PageWriter

DEAD = 2**22 - 3  # no process has this number here


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of which only its recipe and its log are left."""
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.write_recipe(load_recipe(write_tiny_recipe(tmp_path)))
    run.logs.mkdir(parents=True)
    rows = [{"step": step, "loss": 2.0} for step in range(1, 8)]
    (run.logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "lo')
    return run


def incident(kind: str, **more: Any) -> Incident:
    values = {
        "generation": 3,
        "rank": 5,
        "pid": DEAD,
        "node": "node-7",
        "step": 41,
        "phase": "reduce",
        "code": None,
        "action": "stop",
        "time": "2026-03-01T10:00:00+00:00",
    }
    return Incident(kind, **{**values, **more})


def beat(run: RunDirectory, rank: int, step: int, phase: str, generation: int = 3, **more: Any) -> None:
    folder = heartbeat_folder(run, generation)
    folder.mkdir(parents=True, exist_ok=True)
    row = {"rank": rank, "pid": DEAD, "step": step, "phase": phase, "at": time.monotonic(), "node": platform.node()}
    (folder / f"rank-{rank:05d}").write_text(json.dumps({**row, **more}))


@pytest.mark.parametrize(
    ("left", "sentence", "advice"),
    [
        (
            incident("hang", state="T", seconds=4.2, collective="all_reduce number 9 over tensor, which it was in"),
            "rank 5 (process 4194301 on node-7) held up the others for 4 s; it was stopped by a signal in step 41, "
            "phase reduce. Its last collective: all_reduce number 9 over tensor, which it was in.",
            "Start it again",
        ),
        (incident("hang", state="D"), "it was waiting for a disk or a device", "device driver of node-7"),
        (incident("hang", state="S", phase="data"), "phase data", "whether node-7 can still read the corpus"),
        (incident("crash", code=-9), "was killed by SIGKILL", "who killed it"),
        (incident("crash", code=-11), "was killed by SIGSEGV", "`anychip doctor` on node-7"),
        (incident("crash", code=-64), "was killed by", "`anychip doctor` on node-7"),
        (incident("oom", code=-9), "ran out of memory and was killed by the system", "training.micro_batch_size"),
        (
            incident("overdue", state="S", phase="save", seconds=60.0, action="end"),
            "had not saved and left 60 s after it was asked to; it was waiting in step 41, phase save. It was killed.",
            "--grace",
        ),
        (incident("disk", code=5), "the disk did not take what it wrote", "make room"),
        (incident("error", code=1, detail=["ValueError: {x}"]), "ended with exit code 1", "mend this before the next"),
        (incident("unfit", code=3, detail=["anychip: NaN"]), "ended with exit code 3", "anychip: NaN"),
        (
            incident("suspect", code=4, action="shrink"),
            "was the one suspected of wrong results or of memory that changes, in step 41",
            "`anychip probe` on node-7",
        ),
        (
            incident("preempted", code=130, detail=["saved"]),
            "ended with exit code 130 (saved) in step 41, phase reduce. Training was stopped and saved its state.",
            "Start it again",
        ),
        (
            incident("preempted", code=-9),
            "was killed by SIGKILL in step 41, phase reduce. Training was stopped by force before all had saved.",
            "Start it again",
        ),
        (
            incident("preempted", code=130, step=0),
            "ended with exit code 130 (no message) before its first step. Training was stopped by force before all",
            "Start it again",
        ),
        (
            incident("crash", code=-11, action="end"),
            "was killed by SIGSEGV in step 41, phase reduce. The run had been asked to stop, and was not started",
            "`anychip doctor` on node-7",
        ),
        (incident("of tomorrow"), "rank 5", "Start it again"),
    ],
)
def test_every_kind_of_incident_has_a_sentence(run: RunDirectory, left: Incident, sentence: str, advice: str) -> None:
    IncidentLog(run.logs / LOG_NAME).note(left)
    text = explain(run)
    assert "2026-03-01T10:00:00+00:00" in text and "node-7" in text
    assert sentence in text
    assert advice in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("What to do: ")


def test_one_that_fails_again_and_again_is_to_be_taken_out(run: RunDirectory) -> None:
    for _ in range(3):
        IncidentLog(run.logs / LOG_NAME).note(incident("crash", code=-11))
    assert "rank 5 on node-7 failed 3 times: take its chip out" in explain(run)
    IncidentLog(run.logs / LOG_NAME).note(slow_incident(Slow(3, 20, 24, 2.5, 0.6, "data"), 3, 99, "node-2"))
    assert "take its chip out" in explain(run)
    IncidentLog(run.logs / LOG_NAME).note(incident("bad_input", code=2, detail=["anychip: no such file"]))
    assert "mend this before the next start: anychip: no such file" in explain(run)


def test_failures_far_apart_are_no_reason_to_take_a_chip_out(run: RunDirectory) -> None:
    for when in ["2026-03-01T09:40:00+00:00", "2026-03-01T09:55:00+00:00", "soon", "2026-03-01T10:00:00+00:00"]:
        IncidentLog(run.logs / LOG_NAME).note(incident("crash", code=-9, time=when))
    assert "find out who killed it" in explain(run).splitlines()[-1]


def test_a_run_under_torchrun_is_explained_by_its_logs(run: RunDirectory) -> None:
    (run.logs / "ranks").mkdir()
    (run.logs / "ranks" / "rank-00000.log").write_text("RuntimeError: Connection reset by peer\n")
    (run.logs / "ranks" / "rank-00001.log").write_text("Traceback\nValueError: it was this\nlast words\n")
    text = explain(run)
    assert "the log ends at step 7" in text
    assert "rank 00001 wrote last" in text and "ValueError: it was this" in text
    assert "No incident was recorded" in text


def test_a_run_whose_supervisor_was_killed_is_explained_by_heartbeats(run: RunDirectory) -> None:
    IncidentLog(run.logs / LOG_NAME).note(incident("crash", generation=2, code=-9, action="restart"))
    beat(run, 0, 50, "reduce")
    beat(run, 1, 49, "optimizer")
    writer = PageWriter(run.logs / "heartbeats" / "generation-0003" / "rank-00001.work")
    writer.write_message(Message(77, "all_gather", "shard", 512))
    writer.close()
    text = explain(run)
    assert "nobody wrote down why" in text
    assert f"The furthest behind was rank 1 on {platform.node()} in step 49, optimizer" in text
    assert "all_gather number 77 over shard, 512 bytes, which it was in" in text


def test_the_newest_generation_is_the_one_of_the_highest_number(run: RunDirectory) -> None:
    beat(run, 0, 50, "reduce", 9999)
    beat(run, 0, 60, "reduce", 10000)
    (run.logs / "heartbeats" / "generation-zero").mkdir()
    assert [path.name for path in heartbeat_folders(run)] == ["generation-9999", "generation-10000"]
    assert next_number(run) == 10001
    assert "in step 60, reduce" in explain(run)
    IncidentLog(run.logs / LOG_NAME).note(incident("crash", generation=10000, code=-9, action="restart"))
    assert "nobody wrote down why" not in explain(run)


def test_heartbeats_that_are_torn_are_said_to_be(run: RunDirectory) -> None:
    for rank in range(3):
        beat(run, rank, 50, "reduce")
    folder = heartbeat_folder(run, 3)
    (folder / "rank-00000").write_text(" " * 255 + "\n")  # it had just begun
    (folder / "rank-00001").write_text('{"rank": 1, "pi')
    text = explain(run)
    assert f"1 of 3 heartbeats in {folder} cannot be read." in text and "in step 50, reduce" in text
    (folder / "rank-00000").write_bytes(b"\0" * 256)
    (folder / "rank-00002").write_text("[]")
    assert f"3 of 3 heartbeats in {folder} cannot be read." in explain(run)
    IncidentLog(run.logs / LOG_NAME).note(incident("crash", code=-9))
    assert "3 of 3 heartbeats" in explain(run)


@pytest.mark.parametrize("folder", ["dpo", "dpo/adapter"])
def test_a_stage_that_the_guard_stopped_is_named(run: RunDirectory, folder: str) -> None:
    run.finish("train", {"steps": 12})
    run.finish("sft", {"steps": 4})
    for name in "sft", folder:
        logs = run.root / name / "logs"
        logs.mkdir(parents=True)
        (logs / "metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n')
        row = {"step": 5, "problem": "loss is nan", "action": "stop", "documents": ["pairs/7"]}
        (logs / "guard.jsonl").write_text(json.dumps(row) + "\n")
    text = explain(run)
    assert "The stage dpo was stopped by the guard in step 5, loss is nan; there is no checkpoint" in text
    assert "the log ends at step 4" in text and "pairs/7" in text
    assert "The stage sft" not in text and "Nothing to do" not in text
    assert "`anychip dpo RECIPE` again, with a lower tune.dpo.optimizer.lr" in text.splitlines()[-1]
    with (run.root / folder / "logs" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 9, "loss": 2.0}\n')  # it was started again, and killed
    text = explain(run)
    assert "The stage dpo is not done" in text
    assert text.splitlines()[-1] == "What to do: run `anychip dpo RECIPE` again: it goes on."
    run.finish("dpo", {"steps": 12})
    assert explain(run).endswith("Nothing to do.")


def test_processes_of_other_hosts_are_not_called_dead(run: RunDirectory) -> None:
    beat(run, 0, 50, "reduce", node="elsewhere")
    text = explain(run)
    assert "those of elsewhere, not of this host" in text
    assert "rank 0 on elsewhere in step 50, reduce" in text


def test_living_processes_are_told_from_dead_ones(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(run, 0, 50, "reduce", pid=os.getpid())
    beat(run, 1, 50, "data")
    monkeypatch.setattr("anychip.supervise.explain._is_alive", lambda beat: beat.pid == os.getpid())
    assert "1 of 2 processes are alive here" in explain(run)


def test_slow_processes_are_told_beside_what_ended_the_run(run: RunDirectory) -> None:
    IncidentLog(run.logs / LOG_NAME).note(slow_incident(Slow(3, 20, 24, 2.5, 0.6, "data"), 3, 99, "node-2"))
    alone = explain(run)
    assert "Slow: " in alone and "2.5 times as long as its fellows" in alone
    assert "look at node-2" in alone.splitlines()[-1]
    IncidentLog(run.logs / LOG_NAME).note(incident("crash", code=-9))
    assert "who killed it" in explain(run).splitlines()[-1]


def test_a_stop_by_the_guard_names_documents(run: RunDirectory) -> None:
    row = {"step": 9, "problem": "loss is nan", "action": "stop", "documents": ["words/3", "words/8"]}
    (run.logs / "guard.jsonl").write_text(json.dumps(row) + "\n")
    text = explain(run)
    assert "step 9, loss is nan" in text and "words/3, words/8" in text
    assert "look at the documents" in text.splitlines()[-1]


def test_only_what_was_judged_bad_is_counted_as_such(run: RunDirectory) -> None:
    path = run.logs / "guard.jsonl"
    actions = ["skip", "repair", "rollback", "recompute", "reload", "leave_out"]
    rows = [{"step": step, "problem": f"it {action}", "action": action} for step, action in enumerate(actions, 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    assert "Steps judged bad: 2; the last: step 3, it rollback." in explain(run)
    assert "Other findings of the guard: 4; the last: step 6, it leave_out." in explain(run)
    path.write_text(text + "x" * (1 << 16) + "\n" + text)
    assert "Steps judged bad: at least 2;" in explain(run)
    path.write_text(json.dumps(rows[1]))
    assert "judged bad" not in explain(run)


def test_a_run_that_ended_needs_nothing(run: RunDirectory) -> None:
    run.finish("train", {"steps": 12})
    assert "training ended at step 12 of 12" in explain(run)
    run.stage_marker("train").write_text('{"ste')
    assert "training is not done" in explain(run)


FILES = (
    f"logs/{LOG_NAME}",
    "logs/metrics.jsonl",
    "logs/guard.jsonl",
    "logs/ranks/rank-00000.log",
    "logs/heartbeats/generation-0003/rank-00000",
    "logs/heartbeats/generation-0003/rank-00000.work",
    "stages/train.json",
    "sft/logs/guard.jsonl",
    "sft/logs/metrics.jsonl",
    "checkpoints/step-3/COMPLETE",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["kind", "rank", "pid", "step", "phase", "at", "node", "stage", "detail", "stack", "code", "documents", "problem"]
)
ROWS = st.dictionaries(NAMES, JSON, max_size=8).map(lambda row: json.dumps(row).encode())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(FILES), st.binary(max_size=200) | ROWS, max_size=5))
def test_whatever_is_left_there_is_a_text(run: RunDirectory, left: dict[str, bytes]) -> None:
    for name in FILES:
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if name in left:
            path.write_bytes(left[name])
    assert str(run.root) in explain(run)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=8))
def test_a_line_with_anything_in_it_is_an_incident_or_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = json.loads(json.dumps(vars(incident("crash"))))
    path = tmp_path / "incidents.jsonl"
    path.write_text(json.dumps({**whole, **more}))
    assert all(isinstance(found.sentence(), str) for found in read_incidents(path))
