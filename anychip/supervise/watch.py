"""Reads heartbeats: how far training is, whether it hangs, and who holds the others up."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anychip.parallel.messages import Message
from anychip.supervise.stragglers import Slow, Stragglers
from anychip.train.heartbeat import PHASES
from anychip.train.own_time import StepTime

# A hang is silence of max(4 s, 3 x the 99th percentile of recent steps): with the stacks it is named within 5 s.
_LEAST_SECONDS, _STEPS = 4.0, 3.0
_START_SECONDS = 600.0  # until the first step is made: imports, compilation, reading a checkpoint
_LONG_PHASES, _LONG_SECONDS = ("answer", "evaluate", "save"), 120.0
_STACK_SECONDS, _POLL_SECONDS = 0.8, 0.05
_RECENT_STEPS = 100
_FRAMES = 40
_INNERMOST = 3  # frames that tell what a thread is doing, rather than why
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_WAITED_FOR = "which the training thread waits for:"


@dataclass(frozen=True)
class Beat:
    """What a process said last. `at` is time.monotonic of this host."""

    rank: int
    pid: int
    step: int
    phase: str
    at: float
    stage: int = 0  # of the pipeline
    node: str = ""


@dataclass(frozen=True)
class Hang:
    """Silence of `seconds`; `beat` is the last of the process that caused it, `state` its state by the kernel,
    `collective` the last one it began, in words."""

    beat: Beat
    state: str
    seconds: float
    stack: tuple[str, ...]
    collective: str = ""


class Watched(Protocol):
    """Processes on this host or on many. `beats` are by this host's clock; `stack` is what SIGUSR1 made it write;
    `message` is its last collective, and whether it is inside; `new_steps` are times told since the last call, by
    rank."""

    @property
    def size(self) -> int: ...
    def beats(self) -> list[Beat]: ...
    def states(self) -> dict[int, str]: ...
    def pid(self, rank: int) -> int: ...
    def stack(self, rank: int) -> list[str]: ...
    def message(self, rank: int) -> tuple[Message, bool] | None: ...
    def new_steps(self) -> list[tuple[int, StepTime]]: ...
    def signal(self, number: int) -> None: ...
    def pause(self, seconds: float) -> None: ...


class Watch:
    """Follows one generation."""

    def __init__(self, generation: Watched, start_seconds: float = _START_SECONDS) -> None:
        self._generation, self._start_seconds = generation, start_seconds
        self._newest = time.monotonic()
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_began = (0, 0.0)
        self._stragglers: Stragglers | None = None
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

    def stragglers(self) -> list[Slow]:
        """Processes found to be slower than their fellows since the last call."""
        if self._stragglers is None:
            beats = self._generation.beats()
            if len(beats) < self._generation.size:
                return []
            self._stragglers = Stragglers([beat.stage for beat in sorted(beats, key=lambda beat: beat.rank)])
        return [slow for rank, row in self._generation.new_steps() for slow in self._stragglers.take(rank, row)]

    def hang(self, seconds: float) -> Hang:
        """Find the cause of a silence. Processes write their stacks, for which stopped ones are woken."""
        beats, states = self._generation.beats(), self._generation.states()
        messages = {beat.rank: self._generation.message(beat.rank) for beat in beats}
        self._generation.signal(signal.SIGUSR1)
        self._generation.signal(signal.SIGCONT)
        stacks = self._stacks([beat.rank for beat in beats])
        missing = sorted(set(range(self._generation.size)) - messages.keys())
        if missing:  # one that never came to training
            beat = Beat(missing[0], self._generation.pid(missing[0]), 0, "start", 0.0)
            return Hang(beat, states.get(beat.rank, ""), seconds, ())
        waits = {rank: waits_for_others(message, stacks[rank]) for rank, message in messages.items()}
        cause = culprit(beats, states, waits)
        stack, collective = tuple(stacks[cause.rank]), describe_last(messages[cause.rank])
        return Hang(cause, states.get(cause.rank, ""), seconds, stack, collective)

    def _stacks(self, ranks: Sequence[int]) -> dict[int, list[str]]:
        """What each process wrote, once it is twice the same and so whole; one that cannot write leaves an empty list
        when the time is over."""
        deadline, before = time.monotonic() + _STACK_SECONDS, dict[int, list[str]]()
        while True:
            stacks = {rank: self._generation.stack(rank) for rank in ranks}
            if (all(stacks.values()) and stacks == before) or time.monotonic() > deadline:
                return stacks
            before = stacks
            self._generation.pause(_POLL_SECONDS)


def culprit(beats: Sequence[Beat], states: Mapping[int, str], waits: Mapping[int, bool]) -> Beat:
    """The process that the others wait for: one that the kernel holds, else one that waits for nobody, else the one
    furthest behind."""

    def key(beat: Beat) -> tuple[bool, bool, int, int, int]:
        phase = PHASES.index(beat.phase) if beat.phase in PHASES else 0
        return states.get(beat.rank, "") not in ("T", "t", "D", "Z", ""), waits[beat.rank], beat.step, phase, beat.rank

    return min(beats, key=key)


def waits_for_others(message: tuple[Message, bool] | None, stack: Sequence[str]) -> bool:
    """Whether a process is inside a collective: it says so, or its innermost frames are PyTorch's for that."""
    return bool(message and message[1]) or any(file in frame for frame in stack[:_INNERMOST] for file in _COLLECTIVES)


def describe_last(message: tuple[Message, bool] | None) -> str:
    """The last collective of a process in words; "" when there was none."""
    if message is None:
        return ""
    return f"{message[0].describe()}, {'which it was in' if message[1] else 'which was over for it'}"


def read_beat(path: Path) -> Beat | None:
    """The line that a process keeps; None while there is none."""
    return beat_of(read_row(path))


def read_row(path: Path) -> Any:
    """The line as it stands there, for another host to judge; None while there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def beat_of(row: Any) -> Beat | None:
    try:
        at, stage, node = float(row["at"]), int(row.get("stage", 0)), str(row.get("node", ""))
        return Beat(int(row["rank"]), int(row["pid"]), int(row["step"]), str(row["phase"]), at, stage, node)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, D waiting for a disk, T stopped; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def training_stack(path: Path, after: int = 0) -> list[str]:
    """The frames, innermost first, of the thread that trains, in the newest dump of faulthandler that begins `after` so
    many bytes: threads are listed newest first, so the one that trains is the last of them that knows this package.
    Where it waits for the thread that reads data, the frames of that one come first."""
    try:
        text = path.read_bytes()[after:].decode("utf-8", "replace")
    except OSError:
        return []
    threads: list[list[str]] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith(("Thread 0x", "Current thread 0x")):
            threads.append([])
        elif line.startswith("File ") and threads:
            threads[-1].append(line)
    ours = [at for at, stack in enumerate(threads) if any("run_training" in frame for frame in stack)]
    if not threads:
        return []
    trains = ours[-1] if ours else len(threads) - 1
    stack = threads[trains]
    if any("concurrent/futures" in frame for frame in stack[:_INNERMOST]):
        stack = _reader(threads[:trains]) + stack
    return stack[:_FRAMES]


def _reader(threads: Sequence[Sequence[str]]) -> list[str]:
    """The frames of the newest thread that is at work on a batch."""
    at_work = [stack for stack in threads if any("anychip/data/" in frame for frame in stack)]
    return [*at_work[-1], _WAITED_FOR] if at_work else []
