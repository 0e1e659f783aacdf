"""A host's agent: starts and ends this host's processes as the coordinator says, and tells it how they are.

It works under a lease. Every report carries the time at which it was sent, every answer brings that time back, and the
lease runs from there: by the time the coordinator gives this host up, counting from when it received the last report,
the lease has run out here and the processes are dead. No two clocks are compared.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anychip.errors import EXIT_DISK, is_of_disk
from anychip.rundir import RunDirectory
from anychip.supervise.coordinating import CoordinatorProcess
from anychip.supervise.decide import EXIT_STOPPED
from anychip.supervise.processes import Generation, Place, open_store
from anychip.supervise.record import fence_of
from anychip.supervise.run import RunFailed, Stop
from anychip.supervise.watch import read_row
from anychip.supervise.wire import Client
from anychip.train.fence import GENERATION_VARIABLE, LEASE_VARIABLE, open_lease, renew_lease
from anychip.train.own_time import StepTime

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_POLL_SECONDS = 0.05
_REPORT_SECONDS = 0.2
_SILENT_SECONDS = 5.0


@dataclass(frozen=True)
class Host:
    """What a host brings to the job. `address` is what it listens on and others reach it by."""

    name: str
    address: str
    slots: int
    interface: str | None = None


class Agent:
    """Runs until the coordinator says that the run is over, or that this host is free."""

    def __init__(
        self,
        host: Host,
        run: RunDirectory,
        command: Sequence[str],
        client: Client,
        job: str,
        stop: Stop,
        coordinator: CoordinatorProcess | None,
        patience_seconds: float,
    ) -> None:
        """`job` identifies what is trained: all hosts must agree. `coordinator` is kept alive if it is on this host."""
        self._host, self._run, self._command, self._client = host, run, command, client
        self._job, self._stop, self._coordinator, self._patience = job, stop, coordinator, patience_seconds
        self._start_id = secrets.token_hex(8)
        self._lease = open_lease()
        self._lease_until = 0.0
        self._generation: Generation | None = None
        self._store: TCPStore | None = None
        self._unstarted: list[dict[str, Any]] = []  # reported in place of processes that could not be started
        self._newest = 0  # no older generation is ever started again
        self._joined = 0
        self._reported = 0.0
        self._told: dict[int, int | None] = {}
        self._steps: list[tuple[int, StepTime]] = []
        self._with_stacks = False
        self._answered = time.monotonic()
        self._passed_on = 0
        self._note = ""

    def run(self) -> None:
        """Raises RunFailed when the run failed, or no coordinator was there for too long."""
        try:
            while True:
                for message in self._client.poll(_POLL_SECONDS):
                    if self._obey(message):
                        return
                self._keep_lease()
                self._join()
                self._report()
                self._pass_on_requests()
                self._keep_connection()
                if self._has_missed_the_end():
                    return
        finally:
            self._end()
            self._client.close()
            if self._coordinator is not None:
                self._coordinator.leave()

    def _keep_connection(self) -> None:
        if self._coordinator is not None and (code := self._coordinator.keep_alive(self._client.ready)) is not None:
            raise RunFailed("The coordinator ended; it said why above.", code or 1)
        if time.monotonic() - self._answered > self._patience:
            do = "Is it running, and is its token this one?"
            raise RunFailed(f"No coordinator answered for {self._patience:.0f} s.", 1, do=do)
        if self._client.silent_seconds > _SILENT_SECONDS:
            self._client.close()  # it may be cut one way: try anew

    def _has_missed_the_end(self) -> bool:
        """Whether training ended while this host was cut off."""
        silent = time.monotonic() - self._answered
        return silent > _SILENT_SECONDS and not self._client.ready and self._run.finished("train") is not None

    def _join(self) -> None:
        """Say who this is on every new connection."""
        if not self._client.ready or self._joined == self._client.connected:
            return
        self._joined = self._client.connected
        self._client.send(
            {
                "kind": "join",
                "sent": time.monotonic(),
                "name": self._host.name,
                "address": self._host.address,
                "slots": self._host.slots,
                "start": self._start_id,
                "job": self._job,
                "generation": self._generation.number if self._generation else 0,
                "leaving": self._passed_on > 0,
                "all": self._is_for_all,
            }
        )

    def _obey(self, message: Mapping[str, Any]) -> bool:
        """True when there is nothing more to do."""
        kind = message.get("kind")
        if kind == "answer":
            self._answered = time.monotonic()
            self._lease_until = float(message["sent"]) + float(message["lease"])
            renew_lease(self._lease, self._lease_until)
        elif kind == "prepare" and message["generation"] > self._newest:
            self._end()
            self._store, port = open_store(self._host.address)
            self._client.send({"kind": "store", "generation": message["generation"], "port": port})
        elif kind == "start" and message["generation"] > self._newest:
            self._start(message)
        elif kind == "signal" and self._generation and self._generation.number == message["generation"]:
            self._generation.signal(int(message["number"]))
            self._with_stacks |= message["number"] == signal.SIGUSR1
        elif kind == "end":
            self._end()
            self._client.send({"kind": "ended", "generation": message["generation"]})
        elif kind == "note":
            self._print_once(str(message["text"]))
        elif kind == "over":
            self._end()
            if message["code"]:
                raise RunFailed(str(message["text"]), int(message["code"]))
            return True
        return False

    def _print_once(self, note: str) -> None:
        if note != self._note:
            print(note, file=sys.stderr, flush=True)
        self._note = note

    def _start(self, message: Mapping[str, Any]) -> None:
        store, self._store = self._store, None
        self._end()
        self._newest, self._store = int(message["generation"]), store
        more = {
            LEASE_VARIABLE: str(self._lease),
            GENERATION_VARIABLE: fence_of(self._run, self._newest),
            "TORCH_GLOO_LAZY_INIT": "1",
        }
        if self._host.interface is not None:
            more["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", self._host.interface)
        place = Place(
            range(self._host.slots),
            int(message["first_rank"]),
            int(message["world_size"]),
            int(message["host_number"]),
            int(message["hosts"]),
            str(message["address"]),
            int(message["port"]),
            str(message["prefix"]),
            more,
        )
        try:
            self._generation = Generation(self._newest, place, self._command, self._run, [self._lease])
        except OSError as error:
            if not is_of_disk(error):
                raise
            print(f"no process can be started: {error}", file=sys.stderr, flush=True)
            ranks = range(place.first_rank, place.first_rank + self._host.slots)
            self._unstarted = [_unstarted(rank, str(error)) for rank in ranks]

    def _end(self) -> None:
        """Kill what runs here and wait for it."""
        if self._generation is not None:
            self._generation.kill()
        self._generation = self._store = None
        self._with_stacks, self._told, self._unstarted = False, {}, []

    def _keep_lease(self) -> None:
        if self._generation is not None and time.monotonic() > self._lease_until:
            print("no coordinator within the lease: this host's processes are ended", file=sys.stderr, flush=True)
            number = self._generation.number
            self._end()
            self._reported = 0.0
            if self._joined == self._client.connected:  # else the join will tell
                self._client.send({"kind": "ended", "generation": number})

    def _report(self) -> None:
        """How this host's processes are; at once when one has ended."""
        generation, now = self._generation, time.monotonic()
        codes = {rank: generation.code(rank) for rank in generation.ranks} if generation else {}
        codes |= {row["rank"]: row["code"] for row in self._unstarted}
        if now - self._reported < _REPORT_SECONDS and codes == self._told:
            return
        if generation is not None:
            generation.show()
        self._reported, self._told = now, codes
        self._steps = generation.new_steps() if generation else []
        ranks = [self._about(generation, rank) for rank in generation.ranks] if generation else []
        ranks += self._unstarted
        number = self._newest if ranks else 0
        self._client.send({"kind": "report", "sent": time.monotonic(), "generation": number, "ranks": ranks})

    def _about(self, generation: Generation, rank: int) -> dict[str, Any]:
        """What is known of one process. `age` is seconds since its last heartbeat."""
        death = generation.death_of(rank)
        about: dict[str, Any] = {
            "rank": rank,
            "pid": generation.pid(rank),
            "state": generation.state(rank),
            "code": generation.code(rank),
            "kind": death.kind if death else "",
            "beat": None,
            "age": 0.0,
            "stack": generation.stack(rank) if self._with_stacks else [],
            "message": generation.message(rank),
            "steps": [asdict(row) for of, row in self._steps[-_MOST_STEPS:] if of == rank],
        }
        row = read_row(generation.heartbeats / f"rank-{rank:05d}")
        if isinstance(row, dict) and isinstance(row.get("at"), float):
            about |= {"beat": row, "age": time.monotonic() - row["at"]}
        if self._with_stacks or death:
            about["lines"] = [line[:_LONGEST_LINE] for line in generation.last_lines(rank)]
        return about

    def _pass_on_requests(self) -> None:
        """Asked to stop, this host leaves: the coordinator lets all processes save first. A second request, or one that
        reaches no coordinator, acts at once."""
        if self._stop.requests == self._passed_on:
            return
        self._passed_on = self._stop.requests
        if self._passed_on > 1 or not self._client.ready:
            raise RunFailed("Stopped.", EXIT_STOPPED, do="Run it again to continue.")
        self._client.send({"kind": "leaving", "all": self._is_for_all})

    @property
    def _is_for_all(self) -> bool:
        """Whether the run stops when this host is asked to: without it nobody would keep the coordinator alive."""
        return self._coordinator is not None


def _unstarted(rank: int, why: str) -> dict[str, Any]:
    """What is reported of a process that the disk had no room to start."""
    about = {"rank": rank, "pid": 0, "state": "", "code": EXIT_DISK, "kind": "disk", "lines": [why]}
    return about | {"beat": None, "age": 0.0, "stack": [], "message": None, "steps": []}


_LONGEST_LINE = 2000
_MOST_STEPS = 512  # of all processes, told in one report: quicker ones are not watched step by step
