"""What a coordinator does with hosts that fail, leave, come and are cut off. No process is started, no time passes."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_hosts import FakeAgent, Script, World

from anychip.errors import InputError
from anychip.supervise.far_processes import Link
from anychip.supervise.incidents import read_incidents
from anychip.supervise.record import Record
from anychip.supervise.run import RunFailed


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path, 1, 2)


def finish(*agents: FakeAgent) -> bool:
    for agent in agents:
        agent.finish()
    return True


def kinds(world: World) -> list[tuple[str, str, str]]:
    return [(i.kind, i.node, i.action) for i in read_incidents(world.run.logs / "incidents.jsonl")]


def test_two_hosts_run_to_the_end(world: World) -> None:
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b)
        assert sorted([*a.ranks, *b.ranks]) == [0, 1]
        yield lambda: finish(a, b)

    world.play(script())
    assert kinds(world) == []
    assert Record(world.run).shares == ()


def test_a_death_starts_all_again_under_a_new_number(world: World) -> None:
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b, number=1)
        b.die(-9)
        yield world.running(a, b, number=2)
        yield lambda: finish(a, b)

    world.play(script())
    assert kinds(world) == [("crash", "b", "restart")]


@pytest.mark.parametrize(("code", "kind"), [(2, "bad_input"), (3, "unfit")])
def test_what_no_start_can_mend_ends_the_run_everywhere(world: World, code: int, kind: str) -> None:
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b)
        b.die(code, kind)
        yield lambda: False

    with pytest.raises(RunFailed, match="the last line") as failed:
        world.play(script())
    assert failed.value.exit_code == code
    assert not a.generation
    assert not b.generation


@pytest.mark.parametrize("way", ["cut", "deaf", "frozen"])
def test_a_host_is_given_up_only_after_its_lease_and_taken_back_when_it_returns(world: World, way: str) -> None:
    a, b = world.agent("a"), world.agent("b")
    ended: list[float] = []

    def one_at_a_time() -> None:
        living = {agent.generation for agent in (a, b) if agent.generation and world.clock.now <= agent.lease_until}
        assert len(living) <= 1, "two generations at once"
        if not ended and a.generation == 2:
            ended.append(world.clock.now)

    world.check = one_at_a_time

    def script() -> Script:
        yield world.running(a, b, number=1)
        until = world.clock.now + 2
        yield lambda: world.clock.now > until
        setattr(b, way, True)
        cut_at = world.clock.now
        yield lambda: a.generation == 2
        assert ended[0] >= cut_at + (2.0 if way != "deaf" else 1.5)  # the lease; the deaf one said itself that it ended
        setattr(b, way, False)
        yield world.running(a, b)
        yield lambda: finish(a, b)

    world.play(script())
    assert kinds(world)[0] == ("lost", "b", "restart")


@pytest.mark.parametrize("connection", ["stays", "breaks"])
def test_a_lease_that_ends_before_the_first_report_is_seen_at_once(world: World, connection: str) -> None:
    """As when the disk holds up a start for longer than the lease, but not so long that the host is given up."""
    a, b = world.agent("a"), world.agent("b")
    b.stalls = True

    def script() -> Script:
        yield lambda: b.frozen
        begun = world.clock.now
        yield lambda: world.clock.now > b.lease_until
        b.frozen = False
        if connection == "breaks":
            b.client.close()
        yield world.running(a, b, number=2)
        assert world.clock.now < begun + 10
        yield lambda: finish(a, b)

    world.play(script())
    assert kinds(world) == [("lost", "b", "restart")]


def test_a_host_is_not_lost_by_what_it_said_before_it_was_told_nor_by_an_end_that_it_was_asked_for() -> None:
    link = Link("a", 6.0)
    nothing: dict[str, Any] = {"generation": 0, "ranks": []}
    for number in (1, 2):
        link.begin(number)
        link.hear_report(nothing)  # sent before it had read of the start
        assert not link.is_lost(number)
        link.end(number)
        link.hear_ended(number)
        link.hear_report(nothing)
        assert link.has_ended(number)
        assert not link.is_lost(number)
    link.begin(3)
    link.hear_ended(2)  # asked for twice, answered twice
    assert not link.is_lost(3)
    assert not link.has_ended(3)
    link.hear_ended(3)
    assert link.is_lost(3)
    assert link.has_ended(3)


def test_a_death_elsewhere_does_not_shorten_the_lease_of_a_host_that_is_cut_off(world: World) -> None:
    """As when its fellows lose it: they die within milliseconds."""
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b, number=1)
        until = world.clock.now + 2
        yield lambda: world.clock.now > until
        b.cut = b.deaf = True
        cut_at = world.clock.now
        a.die(1, "error")
        yield lambda: a.generation == 2
        assert world.clock.now > cut_at + 2.0
        assert not b.generation
        yield lambda: finish(a)

    world.play(script())


@pytest.mark.parametrize("with_its_processes", [False, True])
def test_a_host_that_leaves_lets_all_save_and_is_done_without(world: World, with_its_processes: bool) -> None:
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b)
        for agent in (a, b) if with_its_processes else ():  # those asked agree with all, after every step
            agent.kind, agent.codes = "preempted", dict.fromkeys(agent.ranks, 130)
        b.say("leaving", all=False)
        yield world.running(a)
        assert b.over == 130
        yield lambda: finish(a)

    world.play(script())
    assert kinds(world) == []


def test_when_too_few_are_left_all_stop_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, 2, 2)
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b)
        b.say("leaving", all=False)
        yield lambda: False

    with pytest.raises(RunFailed) as failed:
        world.play(script())
    assert failed.value.exit_code == 130


class Slow(FakeAgent):
    """Its processes leave a second after they are asked to, unless they are killed before. `asked` are signals."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.asked: list[int] = []
        self.leaves_at = math.inf

    def step(self) -> None:
        super().step()
        if self.world.clock.now > self.leaves_at:
            self.kind, self.codes, self.leaves_at = "preempted", dict.fromkeys(self.ranks, 130), math.inf

    def obey(self, message: dict[str, Any]) -> None:
        if message["kind"] != "signal":
            super().obey(message)
            return
        self.asked.append(message["number"])
        self.leaves_at = min(self.leaves_at, self.world.clock.now + 1)
        if message["number"] == signal.SIGKILL:
            self.die(-9)


@pytest.mark.parametrize("first", ["signal", "message"])
def test_one_request_to_a_host_is_one_also_when_the_coordinator_is_sent_it_as_well(world: World, first: str) -> None:
    a = Slow(world, "a")
    world.agents.append(a)

    def script() -> Script:
        yield world.running(a)
        if first == "message":
            a.say("leaving", all=True)
            yield lambda: a.asked
        world.stop.signals += 1
        if first == "signal":
            a.say("leaving", all=True)
        yield lambda: False

    with pytest.raises(RunFailed) as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert a.asked == [signal.SIGTERM]


def test_a_coordinator_that_dies_as_all_are_to_leave_is_told_so_by_the_host_that_joins_again(world: World) -> None:
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        yield world.running(a, b)
        a.leaving = True
        a.client.close()
        yield lambda: False

    with pytest.raises(RunFailed) as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert world.stop.requests == 1
    assert a.started == b.started == [1]  # b did not go on alone


def test_a_late_host_joins_with_a_polite_restart(world: World) -> None:
    a = world.agent("a")
    late: list[FakeAgent] = []

    def script() -> Script:
        yield world.running(a, number=1)
        late.append(world.agent("b"))
        yield world.running(a, late[0], number=2)
        assert a.started == [1, 2]
        yield lambda: finish(a, late[0])

    world.play(script())
    assert kinds(world) == []  # nothing went wrong


def test_the_host_of_the_coordinator_stays_until_all_have_left_though_it_is_a_spare(world: World) -> None:
    a, b = Slow(world, "a"), Slow(world, "b")
    world.agents += [a, b]
    late: list[FakeAgent] = []

    def script() -> Script:
        yield world.running(a, b)
        late.append(world.agent("c"))
        yield lambda: any("spare" in note for note in late[0].notes)
        late[0].say("leaving", all=True)
        yield lambda: a.asked
        assert late[0].over is None
        yield lambda: False

    with pytest.raises(RunFailed) as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert late[0].over is None  # `dismiss` tells it, as all others


class Failing(FakeAgent):
    """Asked to leave, its processes end with `code`; without one they do not end."""

    def __init__(self, world: World, name: str, code: int | None, kind: str) -> None:
        super().__init__(world, name)
        self.end = code, kind

    def obey(self, message: dict[str, Any]) -> None:
        code, kind = self.end
        if message["kind"] != "signal":
            super().obey(message)
        elif message["number"] == signal.SIGTERM and code is not None:
            self.kind, self.codes = kind, dict.fromkeys(self.ranks, code)


@pytest.mark.parametrize(("code", "kind"), [(5, "disk"), (1, "error"), (-9, "oom"), (None, "overdue")])
def test_a_failure_while_all_leave_for_a_late_host_is_written_down_and_all_start_again(
    world: World, code: int | None, kind: str
) -> None:
    a = Failing(world, "a", code, kind)
    world.agents.append(a)
    late: list[FakeAgent] = []

    def script() -> Script:
        yield world.running(a, number=1)
        late.append(world.agent("b"))
        yield world.running(a, late[0], number=2)
        yield lambda: finish(a, late[0])

    world.play(script())
    assert kinds(world) == [(kind, "a", "restart")]


def test_who_has_not_come_to_training_leaves_by_the_signal_for_a_host_that_leaves(world: World) -> None:
    a, b = Failing(world, "a", -signal.SIGTERM, "crash"), world.agent("b")
    world.agents.append(a)

    def script() -> Script:
        yield world.running(a, b)
        b.say("leaving", all=False)
        yield world.running(a)
        yield lambda: finish(a)

    world.play(script())
    assert kinds(world) == []


@pytest.mark.parametrize(("code", "kind"), [(2, "bad_input"), (3, "unfit")])
def test_what_no_start_can_mend_ends_the_run_also_while_all_leave_for_a_late_host(
    world: World, code: int, kind: str
) -> None:
    a = Failing(world, "a", code, kind)
    world.agents.append(a)

    def script() -> Script:
        yield world.running(a, number=1)
        world.agent("b")
        yield lambda: False

    with pytest.raises(RunFailed, match="the last line") as failed:
        world.play(script())
    assert failed.value.exit_code == code


@pytest.mark.parametrize(
    ("code", "kind", "written", "said"),
    [
        (-9, "crash", "preempted", "stopped by force before all had saved. What was saved before is intact"),
        (-15, "crash", "preempted", "stopped by force before all had saved. What was saved before is intact"),
        (-11, "crash", "crash", "killed by SIGSEGV"),
        (-9, "oom", "oom", "ran out of memory"),
        (1, "error", "error", "ended with exit code 1"),
        (130, "preempted", "preempted", "saved its state"),
    ],
)
def test_how_a_run_that_was_asked_to_stop_ended_is_told_as_it_was(
    world: World, code: int, kind: str, written: str, said: str
) -> None:
    a = Failing(world, "a", code, kind)
    world.agents.append(a)

    def script() -> Script:
        yield world.running(a)
        world.stop.signals += 1
        yield lambda: False

    with pytest.raises(RunFailed, match=said) as failed:
        world.play(script())
    assert failed.value.exit_code == 130
    assert ("saved its state" in str(failed.value)) == (code == 130)
    (incident,) = read_incidents(world.run.logs / "incidents.jsonl")
    assert incident.kind == written
    assert "started again from" not in incident.sentence() and "would not help" not in incident.sentence()


def test_a_host_that_fails_again_and_again_is_replaced_for_good(world: World) -> None:
    a, b, c = (world.agent(name) for name in "abc")

    def script() -> Script:
        yield lambda: sum(bool(agent.generation) for agent in (a, b, c)) == 2 and len(world.hosts._links) == 3
        (spare,) = (agent for agent in (a, b, c) if not agent.generation)
        bad, good = (agent for agent in (a, b, c) if agent is not spare)
        for number in (1, 2, 3):
            yield world.running(good, bad, number=number)
            bad.die(-11)
        yield world.running(good, spare, number=4)
        assert any("left out" in note for note in bad.notes)
        assert Record(world.run).quarantined == {bad.name: "crash again and again"}
        yield lambda: finish(good, spare)

    world.play(script())
    assert [action for _, _, action in kinds(world)] == ["restart", "restart", "replace"]


def test_a_new_coordinator_goes_on_with_what_runs(world: World) -> None:
    a, b = world.agent("a"), world.agent("b")

    class Died(Exception):
        pass

    def first() -> Script:
        yield world.running(a, b, number=1)

        def die() -> bool:
            raise Died

        yield die

    with pytest.raises(Died):
        world.hosts.dismiss = lambda *_: None  # type: ignore[method-assign]
        world.play(first())
    a.generation = b.generation = 1  # the supervisor's `finally` ended it, which a killed one does not
    record = Record(world.run)
    record.generation, record.shares = 1, tuple(world.hosts._members.choose())
    record.write()
    world.coordinator_dies()

    def second() -> Script:
        yield world.running(a, b, number=1)
        until = world.clock.now + 10
        yield lambda: world.clock.now > until
        assert (a.generation, b.generation) == (1, 1)
        yield lambda: finish(a, b)

    world.play(second())
    assert a.started == [1]


def test_a_new_coordinator_never_counts_back(world: World) -> None:
    a = world.agent("a")
    world.run.root.mkdir(parents=True)
    (world.run.root / "coordinator.json").write_text(json.dumps({"generation": 41, "shares": [], "quarantined": {}}))
    world.coordinator_dies()

    def script() -> Script:
        yield world.running(a, number=42)
        yield lambda: finish(a)

    world.play(script())


def test_a_host_with_another_recipe_or_a_taken_name_is_sent_away(world: World) -> None:
    a = world.agent("a")
    others: list[FakeAgent] = []

    def script() -> Script:
        yield world.running(a)
        others.extend((world.agent("a"), world.agent("z")))
        others[1].job = "something else"
        yield lambda: others[1].over == 2 and any("another --node-name" in note for note in others[0].notes)
        assert a.generation == 1
        assert not others[0].started
        a.frozen = True  # its process is gone: the other one of its name takes its place
        a.client.close()
        yield lambda: bool(others[0].generation)
        yield lambda: finish(others[0])

    world.play(script())


def test_too_few_hosts_for_too_long(world: World) -> None:
    with pytest.raises(RunFailed, match="too few hosts"):
        world.play(iter([lambda: False]))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
def test_whatever_happens_one_generation_at_a_time_and_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    world = World(monkeypatch, tmp_path, 1, 3)
    agents = [world.agent(name) for name in "abcd"]
    history: list[int] = []

    def one_at_a_time() -> None:
        living = {agent.generation for agent in agents if agent.generation and world.clock.now <= agent.lease_until}
        assert len(living) <= 1, "two generations at once"
        if living and (not history or history[-1] != min(living)):
            history.append(min(living))

    world.check = one_at_a_time

    def script() -> Script:
        for _ in range(12):
            until = world.clock.now + chance.uniform(0.05, 6.0)
            yield lambda until=until: world.clock.now > until
            agent = chance.choice(agents)
            what = chance.choice(["die", "cut", "deaf", "frozen", "heal", "heal"])
            if what == "die":
                if agent.generation:
                    agent.die(-9)
            elif what == "heal":
                for each in agents:
                    each.cut = each.deaf = each.frozen = False
            else:
                setattr(agent, what, True)
        for each in agents:
            each.cut = each.deaf = each.frozen = False
        until = world.clock.now + 30
        yield lambda: world.clock.now > until and any(agent.generation for agent in agents)
        yield lambda: [agent.finish() for agent in agents if agent.generation] and False

    world.play(script(), 3000.0)
    assert history == sorted(set(history))


def test_a_record_that_makes_no_sense_is_refused(world: World) -> None:
    world.run.root.mkdir(parents=True)
    (world.run.root / "coordinator.json").write_text('{"generation": 3')
    with pytest.raises(InputError, match="makes no sense"):
        Record(world.run)
