"""The processes of one generation on many hosts, as their agents report them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anychip.parallel.messages import Message
from anychip.supervise.members import Share
from anychip.supervise.processes import Death, first_death
from anychip.supervise.watch import Beat, beat_of
from anychip.supervise.wire import Connection
from anychip.train.heartbeat import BEFORE_TRAINING
from anychip.train.own_time import SHARED_PHASES, StepTime

_GRACE_SECONDS = 0.3
_END_AGAIN_SECONDS = 0.5
_UNHEARD_SECONDS = 1.5


class Link:
    """A host as the coordinator knows it, through all its connections.

    `wait_seconds` after the last word of a host its lease has run out, and none of its processes is alive.
    """

    def __init__(self, name: str, wait_seconds: float) -> None:
        self.name, self._wait_seconds = name, wait_seconds
        self.start = ""
        self.leaving = False
        self.store_port: int | None = None
        self.generation = 0  # what it ran when it joined or reported last
        self.ranks: dict[int, dict[str, Any]] = {}
        self.steps: list[tuple[int, StepTime]] = []  # that nobody asked for yet
        self._connection: Connection | None = None
        self._heard = time.monotonic()
        self._begun = self._ended = 0  # generations: the newest that it was told to start, up to which none is alive
        self._asked = 0  # the newest generation that it was asked to end
        self._lost = False

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    @property
    def unheard_seconds(self) -> float:
        return time.monotonic() - self._heard

    def drop_if_silent(self) -> None:
        """A connection that nothing comes through for so long is none."""
        if self._connection is not None and self.unheard_seconds > self._wait_seconds:
            self._connection.close()

    def drop_if_deaf(self, since: float) -> None:
        """One that speaks but has not obeyed since then must come anew, and be given no lease until it does."""
        if self._connection is not None and time.monotonic() - since > self._wait_seconds:
            self._connection.close()

    def send(self, message: dict[str, Any]) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.send(message)

    def end(self, generation: int) -> None:
        """Ask it to end a generation."""
        self._asked = max(self._asked, generation)
        self.send({"kind": "end", "generation": generation})

    def begin(self, generation: int) -> None:
        """It is told to start a generation, or was by another coordinator."""
        self._begun, self._lost, self.ranks, self.steps = generation, False, {}, []
        self._heard = time.monotonic()

    def runs(self, generation: int) -> bool:
        """Whether it says so, on a living connection."""
        return self.connected and self.generation == generation

    def has_ended(self, generation: int) -> bool:
        """Whether none of its processes of this generation can be alive."""
        return self._begun < generation or self._ended >= generation or self.unheard_seconds > self._wait_seconds

    def is_lost(self, generation: int) -> bool:
        """Whether its processes of this generation are lost, though it was not told to end them."""
        return self._begun == generation and (self._lost or self.unheard_seconds > self._wait_seconds)

    def hear_join(self, connection: Connection, start: str, generation: int) -> None:
        if self._connection is not None and self._connection is not connection:
            self._connection.close()
        self._connection, self.start, self.leaving = connection, start, False
        self.generation, self._heard = generation, time.monotonic()
        if generation != self._begun:  # it began anew, or its lease ran out
            self._ended, self._lost = max(self._ended, self._begun), True

    def hear_report(self, message: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for one that makes no sense."""
        generation, rows = int(message["generation"]), [_checked(row) for row in message["ranks"]]
        self._heard, self.generation = time.monotonic(), generation
        if generation == self._begun:
            self.ranks = {int(row["rank"]): row | {"heard": self._heard} for row in rows}
            self.steps += [(row["rank"], step) for row in rows for step in row["steps"]]

    def hear_ended(self, generation: int) -> None:
        self._ended = max(self._ended, generation)
        if generation == self._begun > self._asked:  # its lease ran out, maybe before its first report
            self._lost = True


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["beat"], dict | None) or not isinstance(row["stack"], list):
        raise ValueError("a process without beat or stack")
    message = row.get("message")
    return row | {
        "rank": int(row["rank"]),
        "pid": int(row["pid"]),
        "age": float(row["age"]),
        "message": None if message is None else (Message(*message[0]), bool(message[1])),
        "steps": [_step(step) for step in row.get("steps", [])],
    }


def _step(row: dict[str, Any]) -> StepTime:
    own = tuple(map(float, row["own"]))
    if len(own) != len(SHARED_PHASES):
        raise ValueError("a step of other phases")
    return StepTime(int(row["number"]), int(row["step"]), float(row["seconds"]), own)


class FarGeneration:
    """Implements Running over links. `pause` hears what hosts say; `ended` is called when nothing is alive any more."""

    def __init__(
        self,
        number: int,
        shares: Sequence[Share],
        links: Mapping[str, Link],
        pause: Callable[[float], None],
        lease_seconds: float,
        ended: Callable[[], None],
    ) -> None:
        self.number, self.shares = number, tuple(shares)
        self._links, self._pause, self._ended = links, pause, ended
        self._lease_seconds = lease_seconds
        self._share_of = {rank: share for share in shares for rank in share.ranks}

    @property
    def size(self) -> int:
        return len(self._share_of)

    def node(self, rank: int) -> str:
        return self._share_of[rank].name

    def pid(self, rank: int) -> int:
        return int(self._row(rank).get("pid", 0))

    def beats(self) -> list[Beat]:
        """Those of other hosts' clocks are put on this one's by their age; a message's way makes them look younger."""
        rows = (self._row(rank) for rank in self._share_of)
        aged = (row["beat"] | {"at": row["heard"] - row["age"]} for row in rows if row.get("beat"))
        return [beat for row in aged if (beat := beat_of(row)) is not None]

    def has_begun(self) -> bool:
        """Whether every process has come to training, where it can be asked to save and leave."""
        return sum(beat.phase not in BEFORE_TRAINING for beat in self.beats()) == self.size

    def states(self) -> dict[int, str]:
        return {rank: str(row["state"]) for rank in self._share_of if (row := self._row(rank))}

    def stack(self, rank: int) -> list[str]:
        return [str(frame) for frame in self._row(rank).get("stack", [])]

    def message(self, rank: int) -> tuple[Message, bool] | None:
        found: tuple[Message, bool] | None = self._row(rank).get("message")
        return found

    def new_steps(self) -> list[tuple[int, StepTime]]:
        found = [step for share in self.shares for step in self._links[share.name].steps]
        for share in self.shares:
            self._links[share.name].steps = []
        return [(rank, row) for rank, row in found if rank in self._share_of]

    def last_lines(self, rank: int) -> list[str]:
        return [str(line) for line in self._row(rank).get("lines", [])]

    def show(self) -> None:
        """The agent of the first process does."""

    def signal(self, number: int) -> None:
        for link in self._links.values():
            link.send({"kind": "signal", "generation": self.number, "number": int(number)})

    def pause(self, seconds: float) -> None:
        self._pause(seconds)

    def finished(self) -> bool:
        return all(self._row(rank).get("code") == 0 for rank in self._share_of)

    def death(self) -> Death | None:
        """What happened first, as far as can be told: when a host is lost its fellows' processes fail as well."""
        if not self._deaths():
            return None
        self.pause(_GRACE_SECONDS)
        gone = [self._loss(share) for share in self.shares if not self._links[share.name].connected]
        return first_death([*self._deaths(), *gone])

    def unreachable(self) -> Death | None:
        for share in self.shares:
            if self._links[share.name].unheard_seconds > _UNHEARD_SECONDS:
                return self._loss(share)
        return None

    def kill(self) -> None:
        """Returns when every host said that it has ended its processes, or was silent for longer than its lease."""
        began, told = time.monotonic(), -math.inf
        while alive := [link for link in self._links.values() if not link.has_ended(self.number)]:
            if time.monotonic() - told > _END_AGAIN_SECONDS:
                told = time.monotonic()
                for link in alive:
                    link.end(self.number)
                    link.drop_if_deaf(began)
            self.pause(0.02)
        self._ended()

    def _row(self, rank: int) -> dict[str, Any]:
        return self._links[self._share_of[rank].name].ranks.get(rank, {})

    def _deaths(self) -> list[Death]:
        rows = [row for rank in self._share_of if (row := self._row(rank)).get("code")]
        deaths = [Death(int(row["rank"]), int(row["pid"]), int(row["code"]), str(row["kind"])) for row in rows]
        return deaths + [self._loss(share) for share in self.shares if self._links[share.name].is_lost(self.number)]

    def _loss(self, share: Share) -> Death:
        return Death(share.first_rank, self.pid(share.first_rank), None, "lost")
