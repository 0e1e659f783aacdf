"""What follows a death: whether to start again, when, and on which chips."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from anychip.errors import EXIT_BAD_INPUT, EXIT_DISK, EXIT_SUSPECT, EXIT_UNFIT

EXIT_STOPPED = 130
STOP_CODES = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)  # of processes that are made to stop
_LONGEST_WAIT_SECONDS = 60.0
STRIKES, STRIKE_SECONDS = 3, 600.0  # of one unit, after which it is left out
_SAME_ERROR = 2
OUT_OF_MEMORY_CODES = (-9, -6, 1)  # killed by the kernel, aborted by C++, ended by an exception


def kind_of_exit(code: int, *, out_of_memory: bool) -> str:
    """bad_input, unfit, suspect (a chip that computes wrongly), disk, preempted, oom, crash (a signal) or error."""
    known = {
        EXIT_BAD_INPUT: "bad_input",
        EXIT_UNFIT: "unfit",
        EXIT_SUSPECT: "suspect",
        EXIT_DISK: "disk",
        EXIT_STOPPED: "preempted",
    }
    if code in known:
        return known[code]
    if out_of_memory and code in OUT_OF_MEMORY_CODES:
        return "oom"
    return "crash" if code < 0 else "error"


@dataclass
class Policy:
    """Decides after every incident. `budget` restarts without a step of progress between them end the run.

    A unit is what can be left out: a chip on one host, a host on many.
    """

    budget: int
    _without_progress: int = 0
    _best_step: int = 0
    _errors: int = 0
    _strikes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def after(self, kind: str, unit: str, step: int, now: float) -> str:
        """restart, leave_out (restart without the unit, which failed again and again or computes wrongly) or stop."""
        progressed = step > self._best_step
        self._best_step = max(step, self._best_step)
        self._without_progress = 0 if progressed else self._without_progress + 1
        repeats = kind in ("error", "oom")  # what comes again without progress would come for ever
        self._errors = self._errors + 1 if repeats and not progressed else int(repeats)
        if kind in ("bad_input", "unfit", "preempted") or self._errors >= _SAME_ERROR:
            return "stop"
        if self._without_progress > self.budget:
            return "stop"
        if kind == "suspect":
            return "leave_out"
        if kind in ("disk", "overdue"):  # another unit would do no better
            return "restart"
        strikes = [at for at in self._strikes[unit] if now - at < STRIKE_SECONDS] + [now]
        self._strikes[unit] = strikes
        return "leave_out" if kind != "error" and len(strikes) >= STRIKES else "restart"

    def after_no_start(self) -> bool:
        """Whether to try again when a generation could not be started; it counts as a restart without progress."""
        self._without_progress += 1
        return self._without_progress <= self.budget

    @property
    def wait_seconds(self) -> float:
        """Before the next start: none after progress, then 1, 2, 4 ... 60 s."""
        if self._without_progress == 0:
            return 0.0
        return float(min(2 ** (self._without_progress - 1), _LONGEST_WAIT_SECONDS))


@dataclass
class Chips:
    """The chips of one host that take part: `slots`, one process each."""

    slots: list[int]
    min_processes: int
    possible: Callable[[int], bool]  # whether the layout works with so many processes

    def leave_out(self, rank: int) -> bool:
        """Go on without the chip of this rank, if the layout works with fewer."""
        fewer = [slot for at, slot in enumerate(self.slots) if at != rank]
        for count in range(len(fewer), self.min_processes - 1, -1):
            if count and self.possible(count):
                self.slots = fewer[:count]
                return True
        return False
