"""What went wrong in a run, one line of JSON each in logs/incidents.jsonl, and as a sentence."""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anychip.supervise.decide import EXIT_STOPPED
from anychip.supervise.lines import Lines
from anychip.supervise.stragglers import Slow

LOG_NAME = "incidents.jsonl"


@dataclass(frozen=True)
class Incident:
    """`kind`: crash, oom, hang, slow, error, disk, bad_input, unfit, suspect, preempted, overdue (asked to stop,
    it did not) or lost (a host). `action`: restart, shrink, replace, stop, end (the run was asked to stop) or none.

    `collective` is the last one the process began, in words. A slow one takes `times` as long as its fellows since step
    `since`, and the others wait for it for a share `lost` of the time.
    """

    kind: str
    generation: int
    rank: int
    pid: int
    node: str
    step: int
    phase: str
    code: int | None
    action: str
    state: str = ""
    seconds: float = 0.0
    stack: list[str] = field(default_factory=list)
    detail: list[str] = field(default_factory=list)
    collective: str = ""
    since: int = 0
    times: float = 0.0
    lost: float = 0.0
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def sentence(self) -> str:
        """Which rank, where, what, when, and what was done."""
        place = f"rank {self.rank} (process {self.pid} on {self.node})"
        if self.kind == "lost":
            place = f"host {self.node} (of rank {self.rank} on)"
        when = f"in step {self.step}, phase {self.phase}" if self.step else "before its first step"
        last = f" Its last collective: {self.collective}." if self.collective else ""
        return f"{self.time}: {place} {self._what()} {when}.{last} {self.closing()}".strip()

    def closing(self) -> str:
        """What was done."""
        done = _DONE.get(self.action, self.action)
        if self.kind == "overdue":
            return "It was killed." if self.action == "end" else f"It was killed. {done}"
        if self.kind == "preempted":
            # before the first step that is the code of an interrupt, after which nothing is saved
            return _SAVED if self.code == EXIT_STOPPED and self.step else _FORCED
        return done

    def _what(self) -> str:
        last = self.detail[-1] if self.detail else "no message"
        if self.kind == "hang":
            state = _STATES.get(self.state, "was running")
            return f"held up the others for {self.seconds:.0f} s; it {state}"
        if self.kind == "overdue":
            state = _STATES.get(self.state, "was running")
            return f"had not saved and left {self.seconds:.0f} s after it was asked to; it {state}"
        if self.kind == "slow":
            return (
                f"is slow: since step {self.since} it has taken {self.times:.1f} times as long as its fellows, who "
                f"waited for it for {self.lost:.0%} of the time; seen"
            )
        if self.kind == "lost":
            return "could not be reached any more, or its agent died,"
        if self.kind == "oom":
            return f"ran out of memory{' and was killed by the system' if self.code == -signal.SIGKILL else ''}"
        if self.kind == "disk":
            return f"ended because the disk did not take what it wrote ({last})"
        if self.kind == "suspect":
            return "was the one suspected of wrong results or of memory that changes,"
        if self.code is not None and self.code < 0:
            return f"was killed by {_signal_name(-self.code)}"
        return f"ended with exit code {self.code} ({last})"


def slow_incident(slow: Slow, generation: int, pid: int, node: str) -> Incident:
    """Nothing follows from it: training goes on."""
    return Incident(
        kind="slow",
        generation=generation,
        rank=slow.rank,
        pid=pid,
        node=node,
        step=slow.step,
        phase=slow.phase,
        code=None,
        action="none",
        since=slow.since,
        times=round(slow.times, 2),
        lost=round(slow.lost, 3),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_STATES = {
    "T": "was stopped by a signal",
    "t": "was stopped by a debugger",
    "D": "was waiting for a disk or a device",
    "Z": "had died",
    "S": "was waiting",
}
_DONE = {
    "restart": "All processes were started again from the newest checkpoint.",
    "shrink": "It is left out; training went on with fewer processes.",
    "replace": "It is left out; a spare host took its place.",
    "stop": "The run was stopped: starting again would not help.",
    "end": "The run had been asked to stop, and was not started again.",
    "none": "Training goes on.",
}
_SAVED = "Training was stopped and saved its state. Run it again to continue."
_FORCED = (
    "Training was stopped by force before all had saved. What was saved before is intact: run it again to continue."
)


class IncidentLog:
    """Says what happened on standard error and writes it down; see `Lines` for what a full disk does."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)

    def note(self, incident: Incident) -> None:
        self._lines.add(asdict(incident))
        print(incident.sentence(), file=sys.stderr, flush=True)

    def catch_up(self) -> None:
        """To be called now and then."""
        self._lines.catch_up()

    def close(self) -> None:
        self._lines.close()


def read_incidents(path: Path) -> list[Incident]:
    """All whole lines; a torn or foreign one is left out, and so is what a newer release says beside."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [incident for line in lines if (incident := _read(line)) is not None]


def _read(line: str) -> Incident | None:
    try:
        row: Any = json.loads(line)
        known = {name: row[name] for name in _FIELDS if name in row}
        incident = Incident(**known)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return incident if all(_FIELDS[name](value) for name, value in known.items()) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_lines(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_code(value: object) -> bool:
    return value is None or _is_count(value)


_KINDS_OF_VALUES = {
    "str": _is_text,
    "int": _is_count,
    "float": _is_number,
    "list[str]": _is_lines,
    "int | None": _is_code,
}
_FIELDS = {field.name: _KINDS_OF_VALUES[str(field.type)] for field in fields(Incident)}
