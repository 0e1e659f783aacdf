"""The supervisor: start, watch, name, start again, until training ends or starting again is of no use."""

from __future__ import annotations

import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from anychip.errors import AnychipError, InputError
from anychip.parallel.layout import check_batch, resolve_layout
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.decide import EXIT_STOPPED, Policy, kind_of_exit, listed
from anychip.supervise.incidents import LOG_NAME, Incident, record, slow_incident
from anychip.supervise.out_of_memory import MemoryKills
from anychip.supervise.processes import Death, Generation, train_command
from anychip.supervise.watch import Beat, Hang, Watch, read_beat

_POLL_SECONDS = 0.05
_LAST_LINES = 15


class RunFailed(AnychipError):
    """Training ended and was not started again; the exit code is that of the process that failed."""

    def __init__(self, what: str, code: int, **more: str) -> None:
        super().__init__(what, **more)
        self.exit_code = code


@dataclass(frozen=True)
class Limits:
    """`restarts` without progress between them end the run; fewer than `min_processes` are never tried."""

    restarts: int = 20
    min_processes: int = 0  # 0: never fewer
    start_seconds: float = 600.0


def supervise(recipe: Recipe, run: RunDirectory, arguments: Sequence[str], processes: int, limits: Limits) -> None:
    """Run `anychip train ARGUMENTS` in this many processes until it is done. Raises RunFailed when it cannot be."""
    _check(recipe, processes)
    with _stop_signals() as stop:
        _Supervisor(recipe, run, arguments, processes, limits, stop).run()


def _check(recipe: Recipe, processes: int) -> None:
    layout = resolve_layout(recipe.parallel, processes)
    training = recipe.training
    check_batch(recipe.parallel, layout, training.seq_length, training.micro_batch_size, training.global_batch_size)


def _possible(recipe: Recipe, processes: int) -> bool:
    try:
        _check(recipe, processes)
    except InputError:
        return False
    return True


@dataclass
class _Stop:
    """How often the supervisor was asked to stop."""

    requests: int = 0


class _Supervisor:
    def __init__(
        self, recipe: Recipe, run: RunDirectory, arguments: Sequence[str], processes: int, limits: Limits, stop: _Stop
    ) -> None:
        self._run, self._command, self._limits, self._stop = run, train_command(arguments), limits, stop
        self._policy = Policy(
            limits.restarts,
            list(range(processes)),
            limits.min_processes or processes,
            lambda count: _possible(recipe, count),
        )
        self._passed_on = 0

    def run(self) -> None:
        number = _next_number(self._run)
        while True:
            self._memory = MemoryKills()
            generation = Generation(
                number,
                self._policy.slots,
                self._command,
                self._run.logs / "ranks",
                self._run.logs / "heartbeats" / f"generation-{number:04d}",
            )
            try:
                incident = self._watch(generation)
            finally:
                generation.kill()
            if incident is None:
                return
            self._note(incident)
            if incident.action == "stop":
                raise _failure(incident)
            if incident.action == "shrink":
                print(f"using chips {listed(self._policy.slots)}", file=sys.stderr, flush=True)
            self._wait(self._policy.wait_seconds)
            number += 1

    def _watch(self, generation: Generation) -> Incident | None:
        """Until the generation is done (None), or something happened to it; then its processes are still as they were
        found, but for those that were woken to write their stacks."""
        watch = Watch(generation, self._limits.start_seconds)
        with generation.logs[0].open("rb") as shown:
            shown.seek(0, 2)
            while True:
                _show(shown)
                if generation.finished():
                    _show(shown)
                    return None
                silence = watch.silence()
                death = generation.death()
                if death is not None:
                    _show(shown)
                    return self._died(generation, watch, death)
                if silence is not None:
                    return self._hung(generation, watch, watch.hang(silence))
                for slow in watch.stragglers():
                    pid = generation.processes[slow.rank].pid
                    self._note(slow_incident(slow, generation.number, pid, platform.node()))
                self._pass_on_requests(generation)
                time.sleep(_POLL_SECONDS)

    def _note(self, incident: Incident) -> None:
        record(self._run.logs / LOG_NAME, incident)
        print(incident.sentence(), file=sys.stderr, flush=True)

    def _pass_on_requests(self, generation: Generation) -> None:
        """The first request lets every process save and leave; a second one ends them."""
        if self._stop.requests > self._passed_on:
            self._passed_on = self._stop.requests
            generation.signal(signal.SIGTERM if self._passed_on == 1 else signal.SIGKILL)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop.requests:
            time.sleep(_POLL_SECONDS)
        if self._stop.requests:
            raise RunFailed("Stopped between two starts.", EXIT_STOPPED, do="Run it again to continue.")

    def _died(self, generation: Generation, watch: Watch, death: Death) -> Incident:
        lines = _last_lines(generation.logs[death.rank])
        kind = kind_of_exit(death.code, out_of_memory=self._memory.ran_out(death.pid, death.code, lines))
        if self._stop.requests and death.code < 0:
            kind = "preempted"
        beat = read_beat(generation.heartbeats / f"rank-{death.rank:05d}")
        return self._incident(generation, watch, kind, beat or Beat(death.rank, death.pid, 0, "start", 0.0), death.code)

    def _hung(self, generation: Generation, watch: Watch, hang: Hang) -> Incident:
        return self._incident(generation, watch, "hang", hang.beat, None, hang)

    def _incident(
        self, generation: Generation, watch: Watch, kind: str, beat: Beat, code: int | None, hang: Hang | None = None
    ) -> Incident:
        return Incident(
            kind=kind,
            generation=generation.number,
            rank=beat.rank,
            pid=beat.pid,
            node=platform.node(),
            step=beat.step,
            phase=beat.phase,
            code=code,
            action=self._policy.after(kind, beat.rank, watch.step, time.monotonic()),
            state=hang.state if hang else "",
            seconds=round(hang.seconds, 1) if hang else 0.0,
            stack=list(hang.stack) if hang else [],
            detail=_last_lines(generation.logs[beat.rank]),
            collective=hang.collective if hang else "",
        )


def _failure(incident: Incident) -> RunFailed:
    if incident.kind == "preempted":
        return RunFailed("Training was stopped and saved its state.", EXIT_STOPPED, do="Run it again to continue.")
    code = incident.code if incident.code is not None and incident.code > 0 else 1
    last = incident.detail[-1] if incident.detail else ""
    what = last.removeprefix("anychip: ") if incident.kind in ("bad_input", "unfit") else incident.sentence()
    return RunFailed(what, code, do="" if incident.kind in ("bad_input", "unfit") else "See logs/ranks of the run.")


def _next_number(run: RunDirectory) -> int:
    """Generations are numbered through all starts of a run, so that no heartbeat is taken for a newer one's."""
    names = (path.name for path in (run.logs / "heartbeats").glob("generation-*"))
    numbers = [int(name.removeprefix("generation-")) for name in names if name.removeprefix("generation-").isdigit()]
    return max(numbers, default=0) + 1


def _show(log: BinaryIO) -> None:
    """Pass on what the first process has written since the last call."""
    if text := log.read():
        sys.stdout.write(text.decode("utf-8", "replace"))
        sys.stdout.flush()


def _last_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    begun = max((at for at, line in enumerate(lines) if line.startswith("--- generation ")), default=-1)
    return [line for line in lines[begun + 1 :] if line.strip()][-_LAST_LINES:]


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop, previous = _Stop(), {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requests += 1

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
