"""A coordinator, agents that only pretend to run processes, and a clock that goes as fast as they do. One thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_tiny_recipe

from anychip.recipe import load_recipe
from anychip.rundir import RunDirectory
from anychip.supervise.coordinator import Hosts, Terms, job_id
from anychip.supervise.run import Limits, Stop, Supervisor
from anychip.supervise.wire import Client, Server

TOKEN = b"sixteen bytes or more"
_TICK = 0.05
_MODULES = ("agent", "coordinator", "far_processes", "processes", "run", "watch", "wire")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in _MODULES:
            monkeypatch.setattr(f"anychip.supervise.{module}.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeAgent:
    """Does what agent.py does, without processes. `cut` loses what it says, `deaf` what it hears, `stalls` freezes it
    in its next start; `leaving` is what it says when it joins, for all hosts."""

    def __init__(self, world: World, name: str, slots: int = 1) -> None:
        self.world, self.name, self.slots = world, name, slots
        self.client = Client("127.0.0.1", world.server.port, TOKEN)
        self.start_id, self.joined = f"{name}-{id(self)}", 0
        self.generation, self.ranks = 0, range(0)
        self.codes: dict[int, int] = {}
        self.kind, self.step_made, self.lease_until = "crash", 0, 0.0
        self.over: int | None = None
        self.notes: list[str] = []
        self.started: list[int] = []
        self.cut = self.deaf = self.frozen = self.stalls = self.leaving = False
        self.given_up = 0  # what it ended for want of a lease, and has not told
        self.job = world.job

    def step(self) -> None:
        if self.frozen or self.over is not None:
            return
        for message in [] if self.deaf else self.client.poll(0.0):
            self.obey(message)
        if self.frozen:
            return
        if self.generation and self.world.clock.now > self.lease_until:
            self.generation, self.given_up = 0, self.generation
        if self.client.silent_seconds > 3:
            self.client.close()
        if self.cut or not self.client.ready:
            return
        if self.joined != self.client.connected:
            self.joined, self.given_up = self.client.connected, 0
            self.say("join", name=self.name, address="127.0.0.1", slots=self.slots, start=self.start_id, job=self.job,
                     generation=self.generation, leaving=self.leaving, all=self.leaving)  # fmt: skip
        if self.given_up:  # a connection that stays loses nothing
            self.say("ended", generation=self.given_up)
            self.given_up = 0
        self.step_made += 1
        self.say("report", generation=self.generation, ranks=[self.row(rank) for rank in self.ranks_now()])

    def ranks_now(self) -> range:
        return self.ranks if self.generation else range(0)

    def row(self, rank: int) -> dict[str, Any]:
        beat = {"rank": rank, "pid": 100 + rank, "step": self.step_made, "phase": "data", "at": 1.0}
        code = self.codes.get(rank)
        return {"rank": rank, "pid": 100 + rank, "state": "S", "code": code, "kind": self.kind if code else "",
                "beat": beat, "age": 0.0, "stack": [], "lines": ["the last line"]}  # fmt: skip

    def say(self, kind: str, **more: Any) -> None:
        self.client.send({"kind": kind, "sent": self.world.clock.now, **more})

    def obey(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "answer":
            self.lease_until = message["sent"] + message["lease"]
        elif kind == "prepare":
            self.say("store", generation=message["generation"], port=4)
        elif kind == "start":
            assert message["generation"] > max(self.started, default=0), "generations go forward"
            self.started.append(message["generation"])
            self.generation, self.codes = message["generation"], {}
            self.ranks = range(message["first_rank"], message["first_rank"] + self.slots)
            self.frozen, self.stalls = self.stalls, False
        elif kind == "signal" and message["number"] == 15:
            self.kind, self.codes = "preempted", dict.fromkeys(self.ranks, 130)
        elif kind == "end":
            self.generation = 0
            self.say("ended", generation=message["generation"])
        elif kind == "note":
            self.notes.append(message["text"])
        elif kind == "over":
            self.generation, self.over = 0, message["code"]

    def die(self, code: int, kind: str = "crash") -> None:
        self.kind, self.codes = kind, {self.ranks[0]: code}

    def finish(self) -> None:
        self.codes = dict.fromkeys(self.ranks, 0)


Script = Iterator[Callable[[], Any]]


class World:
    """`play` supervises while a script runs: a generator of conditions to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, least: int, most: int) -> None:
        self.clock = Clock(monkeypatch)
        recipe_path = folder / "tiny.yaml"
        self.recipe = load_recipe(recipe_path if recipe_path.exists() else write_tiny_recipe(folder),
                                  ["training.global_batch_size=12", "training.micro_batch_size=1"])  # fmt: skip
        self.run = RunDirectory(folder / "runs" / "tiny")
        self.job, self.terms, self.stop = job_id(self.recipe, self.run), Terms(least, most, 2.0, 1.0, 60.0), Stop()
        self.server = Server("127.0.0.1", 0, TOKEN)
        self.hosts = Hosts(self.recipe, self.run, self.server, TOKEN, self.job, self.terms, self.stop)
        self.agents: list[FakeAgent] = []
        self.check: Callable[[], None] = lambda: None

    def agent(self, name: str, slots: int = 1) -> FakeAgent:
        self.agents.append(FakeAgent(self, name, slots))
        return self.agents[-1]

    def coordinator_dies(self) -> None:
        """Another one takes its place, at its address."""
        port = self.server.port
        self.server.close()
        self.server = Server("127.0.0.1", port, TOKEN)
        self.hosts = Hosts(self.recipe, self.run, self.server, TOKEN, self.job, self.terms, self.stop)

    def play(self, script: Script, seconds: float = 600.0) -> None:
        """Until the supervisor is done; raises what it raises."""
        hear, waiting, end = self.hosts.pause, [next(script)], self.clock.now + seconds

        def pause(duration: float) -> None:
            for agent in self.agents:
                agent.step()
            hear(0.0)
            self.check()
            self.clock.now += min(max(duration, 0.01), _TICK)
            assert self.clock.now < end, f"it never came: {self.describe()}"
            while waiting and waiting[0]():
                try:
                    waiting[0] = next(script)
                except StopIteration:
                    waiting.clear()

        self.hosts.pause = pause  # type: ignore[method-assign]
        try:
            Supervisor(self.run, self.hosts, Limits(), self.stop).run()
        finally:
            for _ in range(20):
                hear(0.0)

    def describe(self) -> str:
        return ", ".join(f"{agent.name}: generation {agent.generation}" for agent in self.agents)

    def running(self, *agents: FakeAgent, number: int | None = None) -> Callable[[], bool]:
        """Whether exactly these run a generation, the same one."""
        return lambda: (
            len({agent.generation for agent in agents}) == 1
            and all(bool(agent.generation) == (agent in agents) for agent in self.agents)
            and number in (None, agents[0].generation)
        )
