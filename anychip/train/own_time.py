"""How long a process works by itself in each phase of a step: what passes, less what it spends in collectives.

All processes of synchronous training take the same time for a step; the slow one is the one that waits for nobody. On
the host waiting is measured by a monotonic clock; on an accelerator, where the host runs ahead, by events on the stream
that a collective runs on or that waits for it, read once they are long done. Only durations leave this process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# Phases in which all processes of a stage have the same to do. The first one also prints, writes and evaluates.
SHARED_PHASES = ("data", "forward_backward", "reduce", "check", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """The `number`-th step that a process made since its start. `own` are its seconds in each of SHARED_PHASES without
    waiting for others, `seconds` all seconds of them."""

    number: int
    step: int
    seconds: float
    own: tuple[float, ...]


class Clock(Protocol):
    """`mark` notes now, `passed` gives the seconds between two marks once they are `reached`."""

    def mark(self) -> Any: ...

    def reached(self, mark: Any) -> bool: ...

    def passed(self, begin: Any, end: Any) -> float: ...

    def forget(self, marks: Iterable[Any]) -> None: ...


class HostClock:
    """For processes whose work is done when a call returns."""

    def mark(self) -> float:
        return time.monotonic()

    def reached(self, mark: float) -> bool:
        return True

    def passed(self, begin: float, end: float) -> float:
        return end - begin

    def forget(self, marks: Iterable[float]) -> None:
        """Numbers cost nothing."""


class DeviceClock:
    """Events on the current stream of this thread, used again and again."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._free: list[Any] = []

    def mark(self) -> Any:
        event = self._free.pop() if self._free else self._event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: Any) -> bool:
        return bool(mark.query())

    def passed(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def forget(self, marks: Iterable[Any]) -> None:
        self._free.extend(marks)


def clock_of(device: torch.device) -> Clock:
    """The device's events where it times by them, the host's clock elsewhere."""
    if device.type == "cpu":
        return HostClock()
    try:
        clock = DeviceClock(torch.get_device_module(device).Event)
        begin, end = clock.mark(), clock.mark()
        torch.accelerator.synchronize()
        clock.passed(begin, end)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return HostClock()
    return clock


@dataclass
class _Step:
    """Marks of one step: where phases begin, and what was waited for in which of them."""

    step: int
    begins: list[tuple[str, Any]] = field(default_factory=list)
    waits: list[tuple[str, Any, Any]] = field(default_factory=list)

    def marks(self) -> Iterable[Any]:
        yield from (mark for _, mark in self.begins)
        for _, begin, end in self.waits:
            yield from (begin, end)


class OwnTime:
    """Collects marks; `begin_step` returns the steps whose times are known by then: on the host the last one."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._number = clock, 0
        self._now = _Step(0)
        self._ended: deque[_Step] = deque()

    def begin_step(self, step: int) -> list[StepTime]:
        if self._now.step:
            self._now.begins.append(("", self._clock.mark()))
            self._ended.append(self._now)
        self._now = _Step(step)
        known = []
        while self._ended and self._clock.reached(self._ended[0].begins[-1][1]):
            known.append(self._measure(self._ended.popleft()))
        return known

    def begin_phase(self, phase: str) -> None:
        self._now.begins.append((phase, self._clock.mark()))

    def begin_wait(self) -> Any:
        return self._clock.mark()

    def end_wait(self, begin: Any) -> None:
        phase = self._now.begins[-1][0] if self._now.begins else ""
        self._now.waits.append((phase, begin, self._clock.mark()))

    def _measure(self, step: _Step) -> StepTime:
        own = dict.fromkeys(SHARED_PHASES, 0.0)
        for (phase, begin), (_, end) in zip(step.begins, step.begins[1:], strict=False):
            if phase in own:
                own[phase] += self._clock.passed(begin, end)
        seconds = sum(own.values())
        for phase, begin, end in step.waits:
            if phase in own:
                own[phase] -= self._clock.passed(begin, end)
        self._clock.forget(step.marks())
        self._number += 1
        return StepTime(self._number, step.step, seconds, tuple(max(0.0, value) for value in own.values()))
