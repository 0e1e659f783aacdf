"""What a process works by itself, whatever clock it is told by, and the page that others read it from."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anychip.parallel.messages import Message
from anychip.train.heartbeat import Heartbeat
from anychip.train.heartbeat_page import PageWriter, read_message, read_steps
from anychip.train.own_time import DeviceClock, HostClock, OwnTime, StepTime, clock_of


class Hands:
    """A clock that a test moves."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def reached(self, mark: float) -> bool:
        return True

    def passed(self, begin: float, end: float) -> float:
        return end - begin

    def forget(self, marks: Iterable[float]) -> None: ...


def test_waiting_is_taken_from_the_phase_it_happens_in() -> None:
    clock = Hands()
    times = OwnTime(clock)
    assert times.begin_step(7) == []
    for phase, seconds, waited in (("data", 1.0, 0.0), ("forward_backward", 5.0, 3.0), ("log", 9.0, 9.0)):
        times.begin_phase(phase)
        begin = times.begin_wait()
        clock.now += waited
        times.end_wait(begin)
        clock.now += seconds - waited
    (row,) = times.begin_step(8)
    assert (row.number, row.step, row.seconds) == (1, 7, 6.0)  # of the phases that all share
    assert row.own == (1.0, 2.0, 0.0, 0.0, 0.0)


class Event:
    """As a device's: it has a time once the device has come to it."""

    device_now, made = 0.0, 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at = Event.device_now

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3

    reached = 0.0


def test_times_of_a_device_are_read_when_it_has_come_there_and_events_are_used_again() -> None:
    clock = DeviceClock(Event)
    times = OwnTime(clock)
    rows: list[StepTime] = []
    for step in range(1, 9):
        rows += times.begin_step(step)
        times.begin_phase("forward_backward")
        Event.device_now += 2.0
        begin = times.begin_wait()
        Event.device_now += 1.0
        times.end_wait(begin)
        Event.reached = Event.device_now - 3.0  # the device is a step behind
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.own[1] == pytest.approx(2.0) and row.seconds == pytest.approx(3.0) for row in rows)
    assert Event.made < 4 * 4


def test_a_device_without_timed_events_is_told_by_the_host() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("meta")), HostClock)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(0, 200))
def test_rows_are_read_back_as_long_as_the_page_holds_them(
    tmp_path_factory: pytest.TempPathFactory, seconds: list[float], after: int
) -> None:
    path = tmp_path_factory.mktemp("page") / "rank-00000.work"
    writer = PageWriter(path)
    rows = [StepTime(number, number + 5, value, (value,) * 5) for number, value in enumerate(seconds, 1)]
    for row in rows:
        writer.write_step(row)
    writer.close()
    assert read_steps(path, after) == [row for row in rows[-64:] if row.number > after]


@given(st.binary(max_size=6000))
def test_a_page_of_anything_is_read_without_harm(tmp_path_factory: pytest.TempPathFactory, page: bytes) -> None:
    path = tmp_path_factory.mktemp("page") / "rank-00000.work"
    path.write_bytes(page)
    assert all(row.seconds >= 0 for row in read_steps(path, 0))
    read_message(path)


def test_the_last_message_is_there_while_it_lasts(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.work"
    assert read_message(path) is None
    writer = PageWriter(path)
    assert read_message(path) is None
    message = Message(12, "reduce_scatter", "shard_context", 1 << 40)
    writer.write_message(message)
    assert read_message(path) == (message, True)
    writer.write_message_done()
    assert read_message(path) == (message, False)
    writer.write_message(Message(13, "o" * 99, "é" * 99, 0))
    found = read_message(path)
    assert found is not None and found[0].operation == "o" * 20
    writer.close()


def test_a_heartbeat_publishes_the_step_before(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 2, stage=1)
    for step in (1, 2):
        heartbeat.begin_step(step)
        heartbeat.beat("forward_backward")
        time.sleep(0.02)
        heartbeat.left(heartbeat.entered(Message(1, "send", "pipeline", 8)))
    (row,) = read_steps(tmp_path / "rank-00002.work", 0)
    assert row.step == 1 and 0.02 <= row.own[1] <= row.seconds
    heartbeat.close()
    silent = Heartbeat(None, 0)
    silent.begin_step(1)
    with silent.listening("x"):
        pass
    silent.close()
