"""Many hosts as what generations run on: who is there, who takes part, and who is known to run nothing any more."""

from __future__ import annotations

import hashlib
import hmac
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.decide import EXIT_STOPPED
from anychip.supervise.far_processes import FarGeneration, Link
from anychip.supervise.members import Members, Share
from anychip.supervise.processes import Running, next_number
from anychip.supervise.record import Record
from anychip.supervise.run import RunFailed, Stop, is_possible
from anychip.supervise.wire import Connection, Server

_POLL_SECONDS = 0.05
_PREPARE_SECONDS = 10.0
MARGIN_SECONDS = 1.0  # beside the lease, before a host that does not answer is taken to run nothing


@dataclass(frozen=True)
class Terms:
    """Numbers of hosts, and times in seconds: the lease, how long to wait for more hosts than are needed, and for those
    that are needed."""

    least: int
    most: int
    lease_seconds: float = 5.0
    settle_seconds: float = 5.0
    patience_seconds: float = 600.0


class Hosts:
    """A Fleet of many hosts. Everything happens in `pause`, which every wait goes through."""

    def __init__(
        self, recipe: Recipe, run: RunDirectory, server: Server, token: bytes, job: str, terms: Terms, stop: Stop
    ) -> None:
        self._run, self._server, self._token, self._job = run, server, token, job
        self._terms, self._stop = terms, stop
        self._record = Record(run)
        self._members = Members(
            terms.least, terms.most, lambda count: is_possible(recipe, count), self._record.quarantined
        )
        self._links: dict[str, Link] = {}
        self._names: dict[Connection, str] = {}
        self._running: FarGeneration | None = None
        self._may_adopt = True
        self._enough_since: float | None = None
        self._more_since: float | None = None
        self._one_left = False

    # A fleet

    def start(self, stop: Stop) -> Running | None:
        self._release()
        if self._may_adopt and (found := self._adopt()):
            return found
        waiting_since = time.monotonic()
        while not stop.requests:
            self.pause(_POLL_SECONDS)
            shares = self._members.choose()
            if shares and self._is_settled(shares) and (generation := self._launch(shares)):
                return generation
            if not shares and self._one_left:
                return None
            if not shares and time.monotonic() - waiting_since > self._terms.patience_seconds:
                there = ", ".join(self._members.available()) or "none"
                raise RunFailed(f"There are too few hosts ({there}); {self._terms.least} are needed.", 1)
        return None

    def change(self) -> str | None:
        generation = self._running
        if generation is None:
            return None
        leaving = [share.name for share in generation.shares if self._links[share.name].leaving]
        if leaving:
            self._one_left = True
            return f"{', '.join(leaving)} leaves"
        if not self._members.would_grow(generation.shares) or not generation.has_begun():
            self._more_since = None
            return None
        now = time.monotonic()
        self._more_since = self._more_since or now
        if now - self._more_since < self._terms.settle_seconds:
            return None
        more = sum(share.slots for share in self._members.choose())
        return f"there are hosts for {more} processes, not {generation.size}"

    def leave_out(self, generation: Running, rank: int, why: str) -> str | None:
        name = generation.node(rank)
        action = self._members.leave_out(name, why, [share.name for share in self._record.shares])
        if action is not None:
            self._record.write()
            text = (
                f"{name} is left out: {why}; remove its entry in coordinator.json before the next start to have it back"
            )
            print(text, file=sys.stderr, flush=True)
            self._links[name].send({"kind": "note", "text": text})
        return action

    def unit(self, generation: Running, rank: int) -> str:
        return generation.node(rank)

    def pause(self, seconds: float) -> None:
        """Hear what the hosts say for so long."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            for connection, message in self._server.poll(max(0.0, left)):
                try:
                    self._hear(connection, message)
                except (KeyError, TypeError, ValueError, OverflowError):
                    connection.close()
            if left <= 0:
                break
        for name, link in self._links.items():
            link.drop_if_silent()
            if not link.connected:
                self._members.went(name)

    def dismiss(self, code: int, text: str) -> None:
        """Tell all hosts that the run is over."""
        self._record.close()
        for link in self._links.values():
            link.send({"kind": "over", "code": code, "text": text})
        self._server.flush(2.0)

    # Starting

    def _is_settled(self, shares: Sequence[Share]) -> bool:
        """Whether to start with these: at once when no more can take part, or when training went on before."""
        now = time.monotonic()
        self._enough_since = self._enough_since or now
        if len(shares) == self._terms.most or (self._record.generation and not self._may_adopt):
            return True
        return now - self._enough_since >= self._terms.settle_seconds

    def _launch(self, shares: list[Share]) -> FarGeneration | None:
        """None when a host was lost while it was started."""
        number = max(self._record.generation + 1, next_number(self._run))
        self._record.begin(number, shares)
        self._may_adopt = False
        first = self._links[shares[0].name]
        first.store_port = None
        first.send({"kind": "prepare", "generation": number})
        deadline = time.monotonic() + _PREPARE_SECONDS
        while first.store_port is None:
            self.pause(_POLL_SECONDS)
            if not first.connected or time.monotonic() > deadline:
                return None
        prefix = hmac.digest(self._token, f"store {self._job} {number}".encode(), "sha256").hex()
        size = sum(share.slots for share in shares)
        for at, share in enumerate(shares):
            self._links[share.name].begin(number)
            self._links[share.name].send(
                {
                    "kind": "start",
                    "generation": number,
                    "first_rank": share.first_rank,
                    "world_size": size,
                    "host_number": at,
                    "hosts": len(shares),
                    "address": shares[0].address,
                    "port": first.store_port,
                    "prefix": prefix,
                }
            )
        names = ", ".join(share.name for share in shares)
        print(f"generation {number}: {size} processes on {names}", file=sys.stderr, flush=True)
        generation = self._follow(number, shares)
        for link in self._links.values():
            self._tell_spare(link)
        return generation

    def _follow(self, number: int, shares: Sequence[Share]) -> FarGeneration:
        links = {share.name: self._links[share.name] for share in shares}
        self._running = FarGeneration(number, shares, links, self.pause, self._terms.lease_seconds, self._all_ended)
        self._more_since, self._one_left = None, False
        return self._running

    def _tell_spare(self, link: Link) -> None:
        if self._running is None or link.name in {share.name for share in self._running.shares}:
            return
        why = self._members.quarantined.get(link.name)
        text = f"is left out: {why}" if why else f"is a spare of generation {self._running.number}"
        link.send({"kind": "note", "text": f"{link.name} {text}"})

    def _all_ended(self) -> None:
        self._running = None
        self._record.ended()

    def _adopt(self) -> FarGeneration | None:
        """The generation of a coordinator that died, if all of its hosts still run it; otherwise it is ended."""
        shares = self._record.shares
        if not shares:
            return None
        for share in shares:
            self._links.setdefault(share.name, Link(share.name, self._terms.lease_seconds + MARGIN_SECONDS))
            self._links[share.name].begin(self._record.generation)
        generation = self._follow(self._record.generation, shares)
        deadline = time.monotonic() + self._terms.lease_seconds + MARGIN_SECONDS
        while time.monotonic() < deadline:
            self.pause(_POLL_SECONDS)
            if all(self._links[share.name].runs(generation.number) for share in shares):
                print(f"generation {generation.number} goes on", file=sys.stderr, flush=True)
                self._may_adopt = False
                return generation
        generation.kill()
        return None

    def _release(self) -> None:
        """Let hosts go that asked for it and run nothing."""
        for link in self._links.values():
            if link.leaving and link.connected:
                link.send({"kind": "over", "code": EXIT_STOPPED, "text": "This host left; the others go on."})
                link.leaving = False

    # Hearing

    def _hear(self, connection: Connection, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "join":
            self._hear_join(connection, message)
            return
        link = self._links[self._names[connection]]
        if kind == "report":
            link.hear_report(message)
            self._answer(link, message)
        elif kind == "store" and message["generation"] == self._record.generation:
            link.store_port = int(message["port"])
        elif kind == "ended":
            link.hear_ended(int(message["generation"]))
        elif kind == "leaving":
            self._let_leave(link, everyone=bool(message["all"]))

    def _let_leave(self, link: Link, *, everyone: bool) -> None:
        """At once when it is a spare, with the end of the generation when it takes part."""
        link.leaving = True
        self._members.went(link.name)
        if everyone:  # this host stays as long as the run: the coordinator ends with it
            self._stop.told = True
        elif self._running is None or link.name not in {share.name for share in self._running.shares}:
            self._release()

    def _answer(self, link: Link, message: dict[str, Any]) -> None:
        link.send({"kind": "answer", "sent": float(message["sent"]), "lease": self._terms.lease_seconds})

    def _hear_join(self, connection: Connection, message: dict[str, Any]) -> None:
        name, start = str(message["name"]), str(message["start"])
        link = self._links.setdefault(name, Link(name, self._terms.lease_seconds + MARGIN_SECONDS))
        if message["job"] != self._job:
            text = f"{name} would train something else: recipe, overrides and layout must be the same on all hosts."
            connection.send({"kind": "over", "code": 2, "text": text})
            return
        if link.connected and link.start != start:
            text = f"there is a host of the name {name}; while it is, this one waits (or give it another --node-name)"
            connection.send({"kind": "note", "text": text})
            connection.close()  # it comes again, and it may be that the other's end was not noticed yet
            return
        self._names = {known: other for known, other in self._names.items() if known.is_open and other != name}
        self._names[connection] = name
        link.hear_join(connection, start, int(message["generation"]))
        if link.generation and (self._running is None or link.generation != self._running.number):
            link.end(link.generation)
        self._members.came(name, str(message["address"]), int(message["slots"]))
        self._tell_spare(link)
        self._answer(link, message)
        if message["leaving"]:
            self._let_leave(link, everyone=bool(message["all"]))


def job_id(recipe: Recipe, run: RunDirectory) -> str:
    """What hosts must agree on: the recipe with its overrides, and the run's name."""
    return hashlib.sha256(f"{run.root.name} {recipe.model_dump_json()}".encode()).hexdigest()
