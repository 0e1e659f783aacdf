"""How long processes are silent in each phase of training when all is well, and so how long is too long."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from anychip.errors import InputError
from anychip.train.heartbeat import STEP_PHASES

# A hang is silence of max(4 s, 3 x what was usual before): with the stacks it is named within 5 s. Usual is the 99th
# percentile of recent steps, and the longest silence in recent passes of a phase that comes now and then.
LEAST_SECONDS, _TIMES = 4.0, 3.0
_RECENT = 100  # steps, and passes of each phase
# One flush or read of a shared disk now and then takes much longer than all before it, and is no hang.
_OF_DISKS, _DISK_SECONDS = ("settle", "store", "restore", "grow", "save"), 30.0
_UNIFORM, _ENOUGH = ("answer", "evaluate"), 3  # phases of equal pieces, and how many of them tell the next


@dataclass(frozen=True)
class Patience:
    """Seconds for what cannot be known. `start`: until processes come to training, for the first step, which compiles,
    and for their end. `quiet`: between two signs of progress in a phase that was not seen whole before."""

    start: float = 600.0
    quiet: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("--start-seconds", self.start), ("--quiet-seconds", self.quiet)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{value:g} is not a number of seconds above 0.", where=name)


class Silences:
    """The longest silence in each pass of each phase, a pass being from when anyone is in it until nobody is."""

    def __init__(self) -> None:
        self._now: dict[str, list[float]] = {}  # of the running passes: the longest silence, how many
        self._ended: dict[str, deque[float]] = {}

    def present(self, phases: Collection[str]) -> None:
        """These are the phases that processes are in."""
        for phase in self._now.keys() - phases:
            longest, count = self._now.pop(phase)
            if count:  # else it passed between two looks
                self._ended.setdefault(phase, deque(maxlen=_RECENT)).append(longest)
        for phase in phases - self._now.keys():
            self._now[phase] = [0.0, 0.0]

    def note(self, phase: str, seconds: float) -> None:
        """A silence ended that began in this phase."""
        longest, count = self._now.get(phase, (0.0, 0.0))
        self._now[phase] = [max(longest, seconds), count + 1]

    def limit(self, phase: str) -> float | None:
        """What is too long, by what is known; None while that is nothing."""
        known = list(self._ended.get(phase, ()))
        longest, count = self._now.get(phase, (0.0, 0.0))
        if known or (phase in _UNIFORM and count > _ENOUGH):
            known.append(longest)
        return too_long(max(known)) if known else None


class Limits:
    """What is too long for processes that are in some phases, by the steps and passes before."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._step, self._in_step = 0, 0.0
        self._silences = Silences()

    def hear(self, phases: Collection[str], silence: float, step: int) -> None:
        """Someone said something, `silence` seconds after the word before it, when processes were in these phases."""
        for phase in phases:
            self._silences.note(phase, silence)
        if phases and all(phase in STEP_PHASES for phase in phases):
            self._in_step += silence
        if step > self._step and self._step:
            self._steps.append(self._in_step / (step - self._step))
        if step != self._step:  # less: training went back
            self._step, self._in_step = step, 0.0

    def present(self, phases: Collection[str]) -> None:
        self._silences.present(phases)

    def longest(self, phases: Collection[str]) -> float:
        """Seconds; of several phases the one that takes longest."""
        return max(map(self._of, phases))

    def _of(self, phase: str) -> float:
        if phase in ("start", "leave") or (phase in STEP_PHASES and not self._steps):
            return self._patience.start
        if phase in STEP_PHASES:
            return too_long(sorted(self._steps)[int(0.99 * (len(self._steps) - 1))])
        known = self._silences.limit(phase)
        if known is None:
            return self._patience.quiet
        return max(known, min(_DISK_SECONDS, self._patience.quiet)) if phase in _OF_DISKS else known


def too_long(usual: float) -> float:
    return max(LEAST_SECONDS, _TIMES * usual)
