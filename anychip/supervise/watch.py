"""Reads heartbeats: how far training is, whether it hangs, and who holds the others up."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anychip.train.heartbeat import PHASES

# A hang is silence of max(4 s, 3 x the 99th percentile of recent steps): with the stacks it is named within 5 s.
_LEAST_SECONDS, _STEPS = 4.0, 3.0
_START_SECONDS = 600.0  # until the first step is made: imports, compilation, reading a checkpoint
_LONG_PHASES, _LONG_SECONDS = ("evaluate", "save"), 120.0
_STACK_SECONDS, _POLL_SECONDS = 0.8, 0.05
_RECENT_STEPS = 100


@dataclass(frozen=True)
class Beat:
    """What a process said last. `at` is time.monotonic of this host."""

    rank: int
    pid: int
    step: int
    phase: str
    at: float


@dataclass(frozen=True)
class Hang:
    """Silence of `seconds`; `beat` is the last of the process that caused it, `state` its state by the kernel."""

    beat: Beat
    state: str
    seconds: float
    stack: tuple[str, ...]


class Watched(Protocol):
    """Processes on this host or on many. `beats` are by this host's clock; `stack` is what SIGUSR1 made it write."""

    @property
    def size(self) -> int: ...
    def beats(self) -> list[Beat]: ...
    def states(self) -> dict[int, str]: ...
    def pid(self, rank: int) -> int: ...
    def stack(self, rank: int) -> list[str]: ...
    def signal(self, number: int) -> None: ...
    def pause(self, seconds: float) -> None: ...


class Watch:
    """Follows one generation."""

    def __init__(self, generation: Watched, start_seconds: float = _START_SECONDS) -> None:
        self._generation, self._start_seconds = generation, start_seconds
        self._newest = time.monotonic()
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_began = (0, 0.0)
        self.step = 0

    def silence(self) -> float | None:
        """Seconds since any process said anything, when that is too long."""
        beats, now = self._generation.beats(), time.monotonic()
        if beats:
            self._newest = max(self._newest, *(beat.at for beat in beats))
            self._measure(max(beats, key=lambda beat: (beat.step, beat.at)))
        silent = now - self._newest
        stopped = silent > _LEAST_SECONDS and "T" in self._generation.states().values()
        return silent if stopped or silent > self._limit(beats) else None

    def _measure(self, beat: Beat) -> None:
        self.step = max(self.step, beat.step)
        step, began = self._step_began
        if beat.step > step:
            if step:
                self._steps.append((beat.at - began) / (beat.step - step))
            self._step_began = (beat.step, beat.at)

    def _limit(self, beats: Sequence[Beat]) -> float:
        if not self._steps or len(beats) < self._generation.size:
            return self._start_seconds
        usual = sorted(self._steps)[int(0.99 * (len(self._steps) - 1))]
        limit = max(_LEAST_SECONDS, _STEPS * usual)
        return max(limit, _LONG_SECONDS) if any(beat.phase in _LONG_PHASES for beat in beats) else limit

    def hang(self, seconds: float) -> Hang:
        """Find the cause of a silence. Processes write their stacks, for which stopped ones are woken."""
        beats, states = self._generation.beats(), self._generation.states()
        self._generation.signal(signal.SIGUSR1)
        self._generation.signal(signal.SIGCONT)
        stacks = self._stacks([beat.rank for beat in beats])
        missing = sorted(set(range(self._generation.size)) - {beat.rank for beat in beats})
        if missing:  # one that never came to training
            beat = Beat(missing[0], self._generation.pid(missing[0]), 0, "start", 0.0)
            return Hang(beat, states.get(beat.rank, ""), seconds, ())
        cause = culprit(beats, states, stacks)
        return Hang(cause, states.get(cause.rank, ""), seconds, tuple(stacks[cause.rank]))

    def _stacks(self, ranks: Sequence[int]) -> dict[int, list[str]]:
        """What each process wrote; one that cannot write leaves an empty list when the time is over."""
        deadline = time.monotonic() + _STACK_SECONDS
        while True:
            stacks = {rank: self._generation.stack(rank) for rank in ranks}
            if all(stacks.values()) or time.monotonic() > deadline:
                return stacks
            self._generation.pause(_POLL_SECONDS)


def culprit(beats: Sequence[Beat], states: dict[int, str], stacks: dict[int, list[str]]) -> Beat:
    """The process that the others wait for: one that the kernel holds, else one that waits for nobody, else the one
    furthest behind."""

    def key(beat: Beat) -> tuple[bool, bool, int, int, int]:
        waits = any("torch/distributed" in frame for frame in stacks[beat.rank])
        phase = PHASES.index(beat.phase) if beat.phase in PHASES else 0
        return states.get(beat.rank, "") not in ("T", "t", "D", "Z", ""), waits, beat.step, phase, beat.rank

    return min(beats, key=key)


def read_beat(path: Path) -> Beat | None:
    """The line that a process keeps; None while there is none."""
    return beat_of(read_row(path))


def read_row(path: Path) -> Any:
    """The line as it stands there, for another host to judge; None while there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def beat_of(row: Any) -> Beat | None:
    try:
        return Beat(int(row["rank"]), int(row["pid"]), int(row["step"]), str(row["phase"]), float(row["at"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, D waiting for a disk, T stopped; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def training_stack(path: Path, frames: int = 40) -> list[str]:
    """The frames, innermost first, of the thread that trains, in the newest dump of faulthandler: threads are listed
    newest first, so the one that trains is the last of them that knows this package."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    threads: list[list[str]] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith(("Thread 0x", "Current thread 0x")):
            threads.append([])
        elif line.startswith("File ") and threads:
            threads[-1].append(line)
    ours = [stack for stack in threads if any("run_training" in frame for frame in stack)]
    return (ours or threads or [[]])[-1][:frames]
