"""A bad step changes nothing; what follows it is the policy's, the same after a restart, and written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_job import counting_batch, counting_job
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anychip.data.batch import Batch
from anychip.data.cursor import DataCursor
from anychip.errors import InputError, UnfitError
from anychip.recipe.schema import (
    CheckpointConfig,
    GuardConfig,
)
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore
from anychip.train.copies import Difference
from anychip.train.guard import BadSteps, Guard, GuardState
from anychip.train.loop import run_training

STEPS = 24


class Tokens:
    """Batches of which those named in `poison` are poisoned."""

    def __init__(self, poison: set[int]) -> None:
        self._poison = poison
        self.read: list[int] = []

    def batch(self, step: int) -> Batch:
        self.read.append(step)
        return counting_batch(step, poisoned=step in self._poison)

    def documents(self, step: int) -> list[str]:
        return [f"book-{step}"]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Run to the end in a folder and return the last checkpoint's tensors."""

    def run(name: str, source: Tokens, save_interval: int = 5, **guard: Any) -> dict[str, Tensor]:
        job = counting_job(
            tmp_path / name,
            source,
            steps=STEPS,
            micro_batch_size=4,
            checkpoint=CheckpointConfig(save_interval=save_interval, keep=0, asynchronous=False),
            guard=GuardConfig(explosion=2.0, **guard),
        )
        run_training(job)
        store = CheckpointStore(tmp_path / name / "checkpoints")
        newest = store.latest()
        assert newest is not None
        return {name: tensor.clone() for name, tensor in store.read(newest, newest.tensors)}

    return run


def state(folder: Path, step: int) -> dict[str, Tensor]:
    """Tensors of the checkpoint of a step."""
    store = CheckpointStore(folder / "checkpoints")
    info = store.open(step)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "guard.jsonl").read_text().splitlines()]


def test_stop_names_the_documents_and_leaves_the_last_checkpoint(
    train: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(UnfitError, match="times its median"):
        train("run", Tokens({17}))
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["batch"], event["documents"], event["action"]) == (18, 17, ["book-17"], "stop")
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [5, 10, 15]


def test_skip_changes_no_bit(train: Callable[..., dict[str, Tensor]], tmp_path: Path) -> None:
    """Weights and optimizer state after the step are those before it, and in between training went on."""
    bad = 22
    train("run", Tokens({bad}), on_bad_step="skip", save_interval=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) if step != bad + 1]
    assert [event["step"] for event in events(tmp_path / "run")] == [bad + 1]
    before, after, later = (state(tmp_path / "run", step) for step in (bad, bad + 1, bad + 2))
    assert {name.split(".")[0] for name in before} == {"model", "optimizer"}
    assert before.keys() == after.keys() == later.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not any(after[name].equal(later[name]) for name in after if name.startswith("model."))
    assert int(later["optimizer.step.norm.weight"]) == STEPS - 1


def test_rollback_is_training_that_never_saw_the_batches(
    train: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    """Batches 15, 16 and 17 are left out: what comes out is what a corpus without them gives."""

    class Without(Tokens):
        def batch(self, step: int) -> Batch:
            return super().batch(step if step < 15 else step + 3)

    found, expected = train("run", Tokens({17}), on_bad_step="rollback"), train("other", Without(set()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    cursor = DataCursor.of_run(RunDirectory(tmp_path / "run"))
    assert cursor.skipped == ((15, 18),)
    assert [row["action"] for row in events(tmp_path / "run")] == ["rollback"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "logs" / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))


def test_rollback_before_the_first_checkpoint_starts_anew(
    train: Callable[..., dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anychip.train.guard._FEWEST_NORMS", 2)

    class Without(Tokens):
        def batch(self, step: int) -> Batch:
            return super().batch(step + 4)

    found, expected = train("run", Tokens({3}), on_bad_step="rollback"), train("other", Without(set()))
    assert DataCursor.of_run(RunDirectory(tmp_path / "run")).skipped == ((0, 4),)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_patience_ends(train: Callable[..., dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UnfitError):
        train("run", Tokens(set(range(15, 60))), on_bad_step="skip", patience=3)
    assert [event["action"] for event in events(tmp_path / "run")] == ["skip", "skip", "stop"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_always_bad(bad: float) -> None:
    guard = Guard(GuardConfig())
    assert guard.judge(bad, 1.0)
    assert guard.judge(1.0, bad)
    assert guard.bad_in_a_row == 2
    assert not guard.judge(1.0, 1.0)
    assert guard.bad_in_a_row == 0


@given(st.lists(st.floats(0.5, 2.0), min_size=20, max_size=60), st.integers(0, 19))
def test_a_restored_guard_judges_as_the_one_that_was_saved(norms: list[float], at: int) -> None:
    config = GuardConfig(explosion=1.5, window=10)
    whole, first, second = Guard(config), Guard(config), Guard(config)
    verdicts = [whole.judge(1.0, norm) for norm in norms]
    found = [first.judge(1.0, norm) for norm in norms[:at]]
    second.restore(GuardState.model_validate_json(first.state().model_dump_json()))
    assert found + [second.judge(1.0, norm) for norm in norms[at:]] == verdicts


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=6))
def test_steps_and_batches_are_each_others_inverse(gaps: list[tuple[int, int]]) -> None:
    cursor, left_out, end = DataCursor(), set(), 0
    for distance, length in gaps:
        start = end + distance
        end = start + length
        cursor = cursor.without(start, end)
        left_out |= set(range(start, end))
    positions = [cursor.position(step) for step in range(100)]
    assert positions == [position for position in range(200) if position not in left_out][:100]
    assert [cursor.step(position) for position in positions] == list(range(100))
    assert all(cursor.step(position) is None for position in left_out)
    assert DataCursor.of_json(json.loads(json.dumps(cursor.as_json()))) == cursor


@pytest.mark.parametrize("text", ["{}", "[[3]]", "[[5, 2]]", "[[1, 4], [3, 6]]", "nonsense", '[["a", 2]]'])
def test_a_damaged_record_of_left_out_batches_is_refused(text: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.skipped.write_text(text)
    with pytest.raises(InputError, match=r"skipped\.json"):
        DataCursor.of_run(run)


def test_copies_without_a_majority_are_counted_beside_rollbacks(tmp_path: Path) -> None:
    bad_steps = BadSteps(GuardConfig(on_bad_step="rollback", patience=2), tmp_path / "guard.jsonl", writes=True)
    differs = [Difference("norm", (1,), (0, 1, 2)), Difference("head", (), (0, 1))]
    assert bad_steps.react(1, 0, "loss is nan", "none", [], 1) == "rollback"
    assert bad_steps.heal(2, differs, 0)
    bad_steps.go_back(differs)
    with pytest.raises(UnfitError, match=r"head differs between ranks 0, 1, .* times that this was so: 2"):
        bad_steps.go_back(differs)


def test_a_full_disk_costs_the_record_and_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    BadSteps(GuardConfig(), Path("/dev/full"), writes=True).leave_out(3, 2, "damaged", ["a.txt"])
    said = capsys.readouterr().out
    assert "No space left on device" in said and "a.txt" in said and "training goes on" in said


def write_rows(path: Path, together: Any) -> None:
    log = BadSteps(GuardConfig(), path, writes=True)
    together.wait(60)
    for step in range(1000):
        log.passed(step, "a" * 150)


def test_rows_of_several_processes_are_whole_and_none_is_taken_for_torn(tmp_path: Path) -> None:
    path, context = tmp_path / "guard.jsonl", get_context("spawn")
    together = context.Barrier(2)
    writers = [context.Process(target=write_rows, args=(path, together)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert sorted(steps) == sorted([*range(1000)] * 2)


def test_a_row_behind_a_torn_one_begins_a_line(tmp_path: Path) -> None:
    bad_steps, log = BadSteps(GuardConfig(), tmp_path / "guard.jsonl", writes=True), tmp_path / "guard.jsonl"
    bad_steps.leave_out(3, 2, "damaged", ["a.txt"])
    with log.open("a") as handle:
        handle.write('{"step": 4, "prob')
    for step in 5, 6:
        bad_steps.leave_out(step, step - 1, "damaged", ["b.txt"])
    rows = log.read_text().splitlines()
    assert rows.pop(1) == '{"step": 4, "prob'
    assert [json.loads(row)["step"] for row in rows] == [3, 5, 6]
