"""The supervisor: start, watch, name, start again, until training ends or starting again is of no use.

What it supervises is a `Fleet`: the chips of this host (`one_host.py`), or many hosts (`coordinator.py`).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal, Protocol

from anychip.errors import EXIT_DISK, EXIT_UNFIT, AnychipError, InputError, is_of_disk
from anychip.parallel.layout import check_batch, resolve_layout
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.decide import EXIT_STOPPED, STOP_CODES, Policy
from anychip.supervise.incidents import LOG_NAME, Incident, IncidentLog, slow_incident
from anychip.supervise.processes import Death, Running
from anychip.supervise.silences import Patience
from anychip.supervise.watch import Beat, Hang, Watch

_POLL_SECONDS = 0.05
_FINAL = ("bad_input", "unfit", "suspect", "preempted")  # kinds that say more than that the run was asked to stop


class RunFailed(AnychipError):
    """Training ended and was not started again; the exit code is that of the process that failed."""

    def __init__(self, what: str, code: int, **more: str) -> None:
        super().__init__(what, **more)
        self.exit_code = code


@dataclass(frozen=True)
class Limits:
    """`restarts` without progress between them end the run. All times in seconds."""

    restarts: int = 20
    patience: Patience = field(default_factory=Patience)
    grace_seconds: float = 60.0  # for saving and leaving when asked to, after which processes are killed


@dataclass
class Stop:
    """Whether the supervisor was asked to stop: how often by signals, and `told` by a host. Both may be one request."""

    signals: int = 0
    told: bool = False

    @property
    def requests(self) -> int:
        return max(self.signals, int(self.told))


class Fleet(Protocol):
    """What generations run on."""

    def start(self, stop: Stop) -> Running | None:
        """Start the next generation; waits until there is enough to start it on. None: it was asked to stop, or too
        little is left. Raises OSError, with nothing started, when the disk does not take what must be written first."""

    def change(self) -> str | None:
        """Why another generation should take the place of the running one, in words; None: it should not."""

    def leave_out(self, generation: Running, rank: int, why: str) -> str | None:
        """Go on without what this rank ran on: shrink, replace, or None when that cannot be."""

    def unit(self, generation: Running, rank: int) -> str:
        """The name of what would be left out."""

    def pause(self, seconds: float) -> None: ...


def check_layout(recipe: Recipe, processes: int) -> None:
    """Raises InputError when the recipe's layout or batch does not work with so many processes."""
    layout = resolve_layout(recipe.parallel, processes)
    training = recipe.training
    check_batch(recipe.parallel, layout, training.seq_length, training.micro_batch_size, training.global_batch_size)


def is_possible(recipe: Recipe, processes: int) -> bool:
    try:
        check_layout(recipe, processes)
    except InputError:
        return False
    return True


class Supervisor:
    """Runs generations on a fleet."""

    def __init__(
        self, run: RunDirectory, fleet: Fleet, limits: Limits, stop: Stop, policy: Policy | None = None
    ) -> None:
        self._run, self._fleet, self._limits, self._stop = run, fleet, limits, stop
        self._policy = policy or Policy(limits.restarts)
        self._incidents = IncidentLog(run.logs / LOG_NAME)
        self._passed_on = 0

    def run(self) -> None:
        """Until training is done. Raises RunFailed when it cannot be."""
        try:
            self._run_generations()
        finally:
            self._incidents.close()

    def _run_generations(self) -> None:
        while True:
            generation = self._start()
            if generation is None:
                raise RunFailed("Stopped between two starts.", EXIT_STOPPED, do="Run it again to continue.")
            try:
                outcome = self._watch(generation)
            finally:
                generation.kill()
            if outcome == "done":
                return
            if isinstance(outcome, Incident):
                self._react(outcome)

    def _start(self) -> Running | None:
        """The next generation, once the disk takes what a start must write."""
        while True:
            try:
                return self._fleet.start(self._stop)
            except OSError as error:
                if not is_of_disk(error):
                    raise
                why = f"{error.filename or self._run.root} cannot be written ({error.strerror})"
            if not self._policy.after_no_start():
                raise RunFailed(f"No process could be started: {why}.", EXIT_DISK, do="Make room, then run it again.")
            wait = self._policy.wait_seconds
            print(f"no process can be started: {why}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            self._wait(wait)

    def _react(self, incident: Incident) -> None:
        self._incidents.note(incident)
        if incident.action in ("stop", "end"):
            raise _failure(incident)
        self._wait(self._policy.wait_seconds)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop.requests:
            self._incidents.catch_up()
            self._fleet.pause(_POLL_SECONDS)

    def _watch(self, generation: Running) -> Incident | Literal["done", "regroup"]:
        """Until the generation is done, or something happened to it; then its processes are still as they were found,
        but for those that were woken to write their stacks."""
        watch = Watch(generation, self._limits.patience)
        asked_since: float | None = None  # to save and leave, for good or for another generation
        while True:
            generation.show()
            self._incidents.catch_up()
            if generation.finished():
                return "done"
            silence = watch.silence()
            death = generation.death() or (generation.unreachable() if silence is not None else None)
            if death is not None:
                if self._has_left(death, asked=asked_since is not None):
                    return "regroup"
                return self._died(generation, watch, death)
            if silence is not None:
                return self._hung(generation, watch, watch.hang(silence))
            for slow in watch.stragglers():
                pid, node = generation.pid(slow.rank), generation.node(slow.rank)
                self._incidents.note(slow_incident(slow, generation.number, pid, node))
            self._pass_on_requests(generation)
            if self._stop.requests:
                asked_since = asked_since or time.monotonic()
            elif asked_since is None and (why := self._fleet.change()):
                print(f"{why}: every process saves and leaves", file=sys.stderr, flush=True)
                generation.signal(signal.SIGTERM)
                asked_since = time.monotonic()
            if asked_since and time.monotonic() - asked_since > self._limits.grace_seconds:
                return self._hung(generation, watch, watch.hang(self._limits.grace_seconds), "overdue")
            generation.pause(_POLL_SECONDS)

    def _has_left(self, death: Death, *, asked: bool) -> bool:
        """Whether this is but how processes leave for another generation. One that has not come to training has
        nothing to save, and ends by the signal."""
        if self._stop.requests:
            return False
        if death.kind == "preempted":  # a host that leaves may have been sent the signal with all its processes
            return asked or bool(self._fleet.change())
        return asked and death.code == -signal.SIGTERM

    def _pass_on_requests(self, generation: Running) -> None:
        """The first request lets every process save and leave; a second one ends them."""
        if self._stop.requests > self._passed_on:
            self._passed_on = self._stop.requests
            generation.signal(signal.SIGTERM if self._passed_on == 1 else signal.SIGKILL)

    def _died(self, generation: Running, watch: Watch, death: Death) -> Incident:
        kind = death.kind
        if self._stop.requests and kind == "crash" and death.code in STOP_CODES:
            kind = "preempted"
        last = {beat.rank: beat for beat in generation.beats()}
        beat = last.get(death.rank, Beat(death.rank, death.pid, 0, "start", 0.0))
        return self._incident(generation, watch, kind, beat, death.code)

    def _hung(self, generation: Running, watch: Watch, hang: Hang, kind: str = "hang") -> Incident:
        return self._incident(generation, watch, kind, hang.beat, None, hang)

    def _incident(
        self, generation: Running, watch: Watch, kind: str, beat: Beat, code: int | None, hang: Hang | None = None
    ) -> Incident:
        unit = self._fleet.unit(generation, beat.rank)
        action = self._policy.after(kind, unit, watch.step, time.monotonic())
        if action == "leave_out":
            suspect = kind == "suspect"  # with it every result would be wrong
            why = "suspected of wrong results or changed memory" if suspect else f"{kind} again and again"
            action = self._fleet.leave_out(generation, beat.rank, why) or ("stop" if suspect else "restart")
        if self._stop.requests and not (action == "stop" and kind in _FINAL):
            action = "end"
        return Incident(
            kind=kind,
            generation=generation.number,
            rank=beat.rank,
            pid=beat.pid,
            node=generation.node(beat.rank),
            step=beat.step,
            phase=beat.phase,
            code=code,
            action=action,
            state=hang.state if hang else "",
            seconds=round(hang.seconds, 1) if hang else 0.0,
            stack=list(hang.stack) if hang else [],
            detail=generation.last_lines(beat.rank),
            collective=hang.collective if hang else "",
        )


def _failure(incident: Incident) -> RunFailed:
    if incident.kind == "preempted":
        return RunFailed(incident.closing(), EXIT_STOPPED)
    if incident.action == "end":
        how = "by force" if incident.kind == "overdue" else "when this had happened"
        do = "What was saved before is intact: run it again to continue."
        return RunFailed(f"Training was stopped {how}: {incident.sentence()}", EXIT_STOPPED, do=do)
    code = incident.code if incident.code is not None and incident.code > 0 else 1
    code = EXIT_UNFIT if incident.kind == "suspect" else code
    last = incident.detail[-1] if incident.detail else ""
    if incident.kind in ("bad_input", "unfit", "suspect"):
        return RunFailed(last.removeprefix("anychip: "), code)
    return RunFailed(incident.sentence(), code, do="See logs/ranks of the run.")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Counts SIGINT and SIGTERM while the block runs."""
    stop, previous = Stop(), {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.signals += 1

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
