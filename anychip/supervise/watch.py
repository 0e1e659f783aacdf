"""Reads heartbeats: how far training is, whether it hangs, and who holds the others up."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anychip.parallel.messages import Message
from anychip.supervise.silences import LEAST_SECONDS, Limits, Patience
from anychip.supervise.stragglers import Slow, Stragglers
from anychip.train.heartbeat import PHASES
from anychip.train.own_time import StepTime

# Phases in which each process has work of its own, and says when it waits for others.
_ALONE = ("grow", "restore", "snapshot", "store")
_STACK_SECONDS, _POLL_SECONDS = 0.8, 0.05
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
class _Alone:
    """The phase of a process, and when it last made progress in it or waited for others."""

    phase: str
    at: float


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

    def __init__(self, generation: Watched, patience: Patience = Patience()) -> None:
        self._generation, self._patience = generation, patience
        self._newest = time.monotonic()
        self._limits, self._phases = Limits(patience), set[str]()
        self._alone: dict[int, _Alone] = {}
        self._alone_limits = Limits(patience)
        self._stuck: set[int] = set()
        self._stragglers: Stragglers | None = None
        self.step = 0

    def silence(self) -> float | None:
        """Seconds since any process said anything, or since one that works by itself and waits for nobody did, when
        that is too long."""
        beats = self._generation.beats()
        if beats:
            self._hear(beats)
        now, limit = time.monotonic(), self._patience.start
        silent = now - self._newest
        if len(beats) == self._generation.size:
            limit = self._limits.longest(self._phases)
        stopped = silent > LEAST_SECONDS and "T" in self._generation.states().values()
        self._stuck = set()
        if stopped or silent > limit:
            return silent
        return self._longest_alone(beats, now)

    def _hear(self, beats: Sequence[Beat]) -> None:
        newest, step = max(beat.at for beat in beats), max(beat.step for beat in beats)
        self.step = max(self.step, step)
        if newest > self._newest:
            self._limits.hear(self._phases, newest - self._newest, step)
            self._newest = newest
        self._phases = {beat.phase for beat in beats}
        self._limits.present(self._phases)

    def _longest_alone(self, beats: Sequence[Beat], now: float) -> float | None:
        """The longest silence of those that are stuck in work of their own; they are remembered."""
        silences = []
        for beat in beats:
            before = self._alone.get(beat.rank)
            if beat.phase not in _ALONE:
                at = beat.at
            elif self._waits(beat.rank):
                at = now
            else:
                at = max(beat.at, before.at if before else 0.0)
            if before and at > before.at and before.phase in _ALONE:
                self._alone_limits.hear({before.phase}, at - before.at, 0)
            self._alone[beat.rank] = _Alone(beat.phase, at)
            if beat.phase in _ALONE and now - at > self._alone_limits.longest({beat.phase}):
                self._stuck.add(beat.rank)
                silences.append(now - at)
        self._alone_limits.present({beat.phase for beat in beats})
        return max(silences, default=None)

    def _waits(self, rank: int) -> bool:
        message = self._generation.message(rank)
        return message is not None and message[1]

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
        cause = culprit([beat for beat in beats if beat.rank in self._stuck] or beats, states, waits)
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
