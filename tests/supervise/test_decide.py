"""What follows an incident, and who is held to have caused one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.parallel.messages import Message
from anychip.rundir import RunDirectory
from anychip.supervise.decide import Chips, Policy, kind_of_exit
from anychip.supervise.incidents import Incident, IncidentLog, read_incidents
from anychip.supervise.many_hosts import RememberingPolicy
from anychip.supervise.processes import Death, first_death
from anychip.supervise.watch import Beat, culprit, describe_last, read_beat, training_stack, waits_for_others


def policy(budget: int = 20) -> Policy:
    return Policy(budget)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (-9, "crash"),
        (-11, "crash"),
        (-6, "crash"),
        (1, "error"),
        (2, "bad_input"),
        (3, "unfit"),
        (4, "suspect"),
        (130, "preempted"),
    ],
)
def test_exit_codes_tell_faults_from_mistakes(code: int, kind: str) -> None:
    assert kind_of_exit(code, out_of_memory=False) == kind


def test_only_a_kill_can_be_for_want_of_memory() -> None:
    assert kind_of_exit(-9, out_of_memory=True) == "oom"
    assert kind_of_exit(-11, out_of_memory=True) == "crash"


@pytest.mark.parametrize("kind", ["bad_input", "unfit", "preempted"])
def test_what_no_start_can_mend_is_not_started_again(kind: str) -> None:
    assert policy().after(kind, "0", 5, 0.0) == "stop"


def test_the_same_error_without_progress_is_a_bug() -> None:
    decide = policy()
    assert [decide.after("error", "0", 7, 0.0), decide.after("error", "0", 7, 1.0)] == ["restart", "stop"]


def test_errors_with_progress_between_them_go_on() -> None:
    decide = policy()
    assert all(decide.after("error", "0", step, float(step)) == "restart" for step in range(1, 50))


def test_waits_grow_without_progress_and_vanish_with_it() -> None:
    decide = policy()
    waits = []
    for number in range(9):
        decide.after("crash", "0", 1, 1000.0 * number)
        waits.append(decide.wait_seconds)
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    decide.after("crash", "0", 2, 10_000.0)
    assert decide.wait_seconds == 0.0


@given(st.lists(st.integers(0, 5), max_size=80))
def test_a_run_without_progress_always_ends_and_one_with_progress_never_does(steps: list[int]) -> None:
    stuck = policy(budget=5)
    assert "stop" in [stuck.after("crash", str(at % 4), 0, 1000.0 * at) for at in range(7)]
    decide, best, since = policy(budget=5), 0, 0
    for at, step in enumerate(steps):
        since = 0 if step > best else since + 1
        best = max(best, step)
        assert (decide.after("crash", str(at % 4), step, 1000.0 * at) == "stop") == (since > 5)
        if since > 5:
            break


def test_who_leaves_too_slowly_is_started_again_however_often() -> None:
    decide = policy()
    assert all(decide.after("overdue", "0", step, 0.0) == "restart" for step in range(1, 9))


def test_who_left_as_it_was_asked_to_is_never_the_cause() -> None:
    left = [Death(rank, 100 + rank, 130, "preempted") for rank in (0, 2)]
    for kind in ("lost", "oom", "crash", "suspect", "bad_input", "unfit", "disk", "error"):
        cause = Death(1, 101, None, kind)
        assert first_death([left[0], cause, left[1]]) is cause


def test_a_chip_that_computes_wrongly_is_left_out_at_once() -> None:
    assert policy().after("suspect", "1", 5, 0.0) == "leave_out"


def test_what_fails_three_times_in_ten_minutes_is_left_out() -> None:
    decide = policy()
    assert [decide.after("crash", "1", at, 60.0 * at) for at in (1, 2, 3)] == ["restart", "restart", "leave_out"]


def test_failures_far_apart_or_of_several_units_leave_none_out() -> None:
    decide = policy()
    assert all(decide.after("crash", "1", step, 601.0 * step) == "restart" for step in range(1, 9))
    assert all(decide.after("crash", str(step % 4), step, 6000.0 + step) == "restart" for step in range(9, 17))


def test_as_many_chips_go_on_as_the_layout_works_with() -> None:
    chips = Chips([0, 1, 2, 3], 2, lambda count: count != 3)
    assert chips.leave_out(1)
    assert chips.slots == [0, 2]  # three processes are impossible, so one more than the bad one is left out
    assert not chips.leave_out(0)
    assert chips.slots == [0, 2]


def beat(rank: int, step: int, phase: str) -> Beat:
    return Beat(rank, 100 + rank, step, phase, 0.0)


def test_a_stopped_process_is_the_culprit() -> None:
    beats = [beat(0, 5, "reduce"), beat(1, 5, "reduce"), beat(2, 5, "reduce")]
    assert culprit(beats, {0: "S", 1: "S", 2: "T"}, dict.fromkeys(range(3), True)).rank == 2
    assert culprit(beats, {0: "D", 1: "S", 2: "S"}, dict.fromkeys(range(3), True)).rank == 0


def test_else_the_one_that_does_not_wait_for_others() -> None:
    beats = [beat(0, 5, "forward_backward"), beat(1, 5, "forward_backward")]
    assert culprit(beats, {0: "S", 1: "R"}, {0: True, 1: False}).rank == 1


def test_else_the_one_furthest_behind() -> None:
    beats = [beat(0, 5, "reduce"), beat(1, 5, "data"), beat(2, 6, "data")]
    assert culprit(beats, {0: "S", 1: "S", 2: "S"}, dict.fromkeys(range(3), True)).rank == 1


def test_a_process_waits_when_it_says_so_or_when_its_innermost_frames_do() -> None:
    message = Message(3, "all_reduce", "tensor", 4)
    waits = 'File "site-packages/torch/distributed/distributed_c10d.py", line 3 in all_reduce'
    computes = 'File "model.py", line 9 in forward'
    schedule = 'File "site-packages/torch/distributed/pipelining/schedules.py", line 5 in step'
    assert waits_for_others((message, True), [computes])
    assert waits_for_others(None, [waits, computes])
    assert not waits_for_others((message, False), [computes, schedule])  # a stage is called by its schedule
    assert describe_last(None) == ""
    assert describe_last((message, True)) == "all_reduce number 3 over tensor, 4 bytes, which it was in"


@given(st.binary(max_size=400))
def test_a_torn_heartbeat_is_none(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.mktemp("beats") / "rank-00000"
    path.write_bytes(text)
    assert read_beat(path) is None or isinstance(read_beat(path), Beat)


def test_the_stack_is_that_of_the_thread_that_trains_in_the_newest_dump(tmp_path: Path) -> None:
    def dump(line: int) -> str:
        main = f'Current thread 0x2 (most recent call first):\n  File "loop.py", line {line} in run_training\n'
        return f'Thread 0x1 (most recent call first):\n  File "pool.py", line 1 in work\n\n{main}'

    path = tmp_path / "stack"
    path.write_text(dump(2) + dump(3))
    assert training_stack(path) == ['File "loop.py", line 3 in run_training']
    assert training_stack(tmp_path / "none") == []


def test_incidents_are_read_back_and_torn_lines_left_out(tmp_path: Path) -> None:
    incident = Incident("crash", 1, 2, 77, "host", 9, "reduce", -9, "restart")
    path = tmp_path / "logs" / "incidents.jsonl"
    IncidentLog(path).note(incident)
    with path.open("a") as handle:
        handle.write('{"kind": "cra')
    assert read_incidents(path) == [incident]
    assert "rank 2 (process 77 on host) was killed by SIGKILL in step 9, phase reduce" in incident.sentence()


def test_a_coordinator_that_is_started_again_remembers_who_failed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first = RememberingPolicy(run, 20)
    assert [first.after("crash", "host-a", 1, at) for at in (1000.0, 1010.0)] == ["restart", "restart"]
    first.after("crash", "host-b", 1, 1020.0)
    assert RememberingPolicy(run, 20).after("crash", "host-a", 2, 1030.0) == "leave_out"
    assert RememberingPolicy(run, 20).after("crash", "host-b", 2, 1030.0) == "restart"
    assert RememberingPolicy(run, 20).after("crash", "host-b", 2, 9999.0) == "restart"  # long after
    (tmp_path / "strikes.json").write_text('{"boot": "another", "strikes": {"host-a": [1000, 1010]}}')
    assert RememberingPolicy(run, 20).after("crash", "host-a", 2, 1030.0) == "restart"
    (tmp_path / "strikes.json").write_text("[")
    assert RememberingPolicy(run, 20).after("crash", "host-a", 2, 1030.0) == "restart"
