"""How long each phase may be silent, by what it was before, and who is found to be stuck."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anychip import alive
from anychip.errors import InputError
from anychip.parallel.messages import Message
from anychip.supervise.silences import Patience
from anychip.supervise.watch import Beat, Watch

COLLECTIVE = Message(1, "gather", "saving", 8)


class Fake:
    """Two processes on a clock of their own, which `watch` looks at every tenth of a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience: Patience) -> None:
        self.now, self.rows = 1000.0, dict[int, Beat]()
        self.inside = {0: False, 1: False}
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("anychip.supervise.watch.time", clock)
        self.watch = Watch(self, patience)  # type: ignore[arg-type]

    size = 2

    def beats(self) -> list[Beat]:
        return list(self.rows.values())

    def states(self) -> dict[int, str]:
        return {0: "S", 1: "S"}

    def pid(self, rank: int) -> int:
        return 100 + rank

    def stack(self, rank: int) -> list[str]:
        return ["a frame"]

    def message(self, rank: int) -> tuple[Message, bool] | None:
        return COLLECTIVE, self.inside[rank]

    def signal(self, number: int) -> None:
        pass

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def say(self, phase: str, step: int = 0, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            self.rows[rank] = Beat(rank, 100 + rank, step, phase, self.now)

    def look(self, seconds: float) -> float | None:
        """The seconds after which a silence is found to be a hang, within these."""
        end, began = self.now + seconds, self.now
        while self.now < end:
            if self.watch.silence() is not None:
                return self.now - began
            self.now += 0.1
        return None

    def silent(self, seconds: float) -> None:
        """Pass time, in which nothing is found."""
        assert self.look(seconds) is None

    def steps(self, first: int, count: int, seconds: float = 1.0) -> None:
        for step in range(first, first + count):
            self.say("data", step)
            self.silent(seconds)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch, Patience(start=50.0, quiet=20.0))


def test_the_start_is_given_its_own_time(fake: Fake) -> None:
    fake.silent(49)
    fake.say("start")
    fake.silent(49)
    assert fake.look(10) == pytest.approx(1.0, abs=0.3)


def test_steps_are_judged_by_steps_alone_however_long_evaluations_are(fake: Fake) -> None:
    fake.steps(1, 3)
    fake.say("evaluate", 3)
    for _ in range(10):
        fake.silent(15)
        fake.say("evaluate", 3)
    fake.steps(4, 3)
    assert fake.look(10) == pytest.approx(3.0, abs=0.3)  # the fourth second


def test_slow_steps_raise_their_limit(fake: Fake) -> None:
    fake.steps(1, 4, seconds=10.0)
    fake.say("data", 5)
    fake.silent(29)
    assert fake.look(5) is not None


@pytest.mark.parametrize("phase", ["evaluate", "store", "snapshot", "settle", "restore", "grow", "save"])
def test_progress_is_no_hang_however_long_it_takes_and_silence_is(fake: Fake, phase: str) -> None:
    fake.steps(1, 3)
    for _ in range(3):  # the first silences of a phase are not known
        fake.say(phase, 3)
        fake.silent(19)
    fake.say(phase, 3)
    for _ in range(100):
        fake.silent(3)
        fake.say(phase, 3)
    assert fake.look(100) is not None


def seconds_after_a_pass(fake: Fake, phase: str) -> float | None:
    """Until silence in a phase is a hang whose longest silence was two seconds the time before."""
    fake.steps(1, 3)
    for silence in (0.5, 2.0, 0.5):
        fake.say(phase, 3)
        fake.silent(silence)
    fake.steps(4, 3)
    fake.say(phase, 6)
    return fake.look(60)


def test_a_phase_that_was_seen_whole_is_judged_by_its_longest_silence(fake: Fake) -> None:
    assert seconds_after_a_pass(fake, "snapshot") == pytest.approx(6.0, abs=0.3)


@pytest.mark.parametrize("phase", ["store", "settle", "restore", "grow", "save"])
@pytest.mark.parametrize(("quiet", "expected"), [(20.0, 20.0), (120.0, 30.0)])
def test_disks_may_take_longer_than_before(
    monkeypatch: pytest.MonkeyPatch, phase: str, quiet: float, expected: float
) -> None:
    fake = Fake(monkeypatch, Patience(start=50.0, quiet=quiet))
    assert seconds_after_a_pass(fake, phase) == pytest.approx(expected, abs=0.3)


def test_the_first_pass_is_given_the_quiet_seconds(fake: Fake) -> None:
    fake.steps(1, 3)
    fake.say("store", 3)
    assert fake.look(60) == pytest.approx(20.0, abs=0.3)


def test_batches_of_the_first_evaluation_tell_of_each_other(fake: Fake) -> None:
    fake.steps(1, 3)
    for _ in range(6):
        fake.say("evaluate", 3)
        fake.silent(0.5)
    assert fake.look(60) == pytest.approx(3.5, abs=0.3)  # of the fourth second


def test_the_end_of_a_run_is_given_as_long_as_its_start(fake: Fake) -> None:
    fake.steps(1, 3)
    for _ in range(5):
        fake.say("leave", 3)
        fake.silent(0.5)
    assert fake.look(60) == pytest.approx(49.5, abs=0.3)


def test_who_is_stuck_in_work_of_its_own_is_found_while_others_go_on(fake: Fake) -> None:
    fake.steps(1, 3)
    fake.say("store", 3)
    found = None
    for _ in range(60):
        fake.say("store", 3, ranks=(0,))
        if (found := fake.look(1)) is not None:
            break
    assert found is not None
    assert fake.now - fake.rows[1].at == pytest.approx(20.0, abs=1.1)
    assert fake.watch.hang(20.0).beat.rank == 1


def test_who_waits_for_another_that_goes_on_is_not_stuck(fake: Fake) -> None:
    fake.steps(1, 3)
    fake.say("store", 3)
    fake.inside[1] = True
    for _ in range(60):
        fake.say("store", 3, ranks=(0,))
        fake.silent(1)
    assert fake.look(30) is not None  # the other one stands still in turn
    assert fake.watch.hang(20.0).beat.rank == 0


@pytest.mark.parametrize("values", [{"start": 0.0}, {"quiet": -1.0}, {"quiet": float("nan")}, {"start": float("inf")}])
def test_seconds_must_be_above_0(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="seconds"):
        Patience(**values)


class Ear:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def begin(self, phase: str) -> str:
        self.heard.append(phase)
        return "before"

    def progressed(self) -> None:
        self.heard.append(".")


def test_work_behind_training_counts_only_while_it_is_waited_for() -> None:
    ear, task = Ear(), alive.Task()
    alive.listen(ear)
    try:
        run_in_thread(task)
        assert ear.heard == []
        with alive.waiting_for(task, "settle"):
            run_in_thread(task)
        run_in_thread(task)
        assert ear.heard == ["settle", ".", "before"]
        alive.progressed()
        assert ear.heard[3:] == ["."]
    finally:
        alive.forget(ear)
    alive.progressed()
    assert len(ear.heard) == 4


def run_in_thread(task: alive.Task) -> None:
    from threading import Thread

    def work() -> None:
        alive.work_at(task)
        alive.progressed()

    thread = Thread(target=work)
    thread.start()
    thread.join()
