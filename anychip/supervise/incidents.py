"""What went wrong in a run, one line of JSON each in logs/incidents.jsonl, and as a sentence."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LOG_NAME = "incidents.jsonl"


@dataclass(frozen=True)
class Incident:
    """`kind`: crash, oom, hang, error, bad_input, unfit, preempted or lost (a host).
    `action`: restart, shrink, replace or stop."""

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
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def sentence(self) -> str:
        """Which rank, where, what, when, and what was done."""
        place = f"rank {self.rank} (process {self.pid} on {self.node})"
        if self.kind == "lost":
            place = f"host {self.node} (of rank {self.rank} on)"
        when = f"in step {self.step}, phase {self.phase}" if self.step else "before its first step"
        return f"{self.time}: {place} {self._what()} {when}. {_DONE.get(self.action, self.action)}"

    def _what(self) -> str:
        if self.kind == "hang":
            state = _STATES.get(self.state, "was running")
            return f"held up the others for {self.seconds:.0f} s; it {state}"
        if self.kind == "lost":
            return "could not be reached any more, or its agent died,"
        if self.kind == "oom":
            return "was killed by the system for want of memory"
        if self.code is not None and self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        last = self.detail[-1] if self.detail else "no message"
        return f"ended with exit code {self.code} ({last})"


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
}


def record(path: Path, incident: Incident) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(asdict(incident)) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def read_incidents(path: Path) -> list[Incident]:
    """All whole lines; a torn or foreign one is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
            found.append(Incident(**row))
        except (ValueError, TypeError):
            continue
    return found
