"""A process says what it is doing, so that whoever watches it can tell slow from stuck, and stuck from the cause.

Watchers name a folder in ANYCHIP_HEARTBEATS. Each process keeps there

    rank-00003         one line of JSON, written anew at every phase of a step, and for progress in a long one
    rank-00003.work    a page of shared memory: its last collective, and the times of its last steps (heartbeat_page.py)
    rank-00003.stack   the stacks of its threads, written when it receives SIGUSR1
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anychip import alive
from anychip.parallel.messages import Message, heard_by
from anychip.train.heartbeat_page import PageWriter
from anychip.train.own_time import OwnTime, clock_of

FOLDER_VARIABLE = "ANYCHIP_HEARTBEATS"
# In the order of their coming. "save" decides what is saved, "snapshot" copies to host memory, "store" writes to disk,
# "settle" waits for a save that began before, "leave" is what comes after the last step.
STEP_PHASES = ("data", "forward_backward", "reduce", "check", "optimizer", "log")
BEFORE_TRAINING = ("grow", "start", "restore")
PHASES = (
    *("data", "answer", "forward_backward", "reduce", "check", "optimizer", "log", "evaluate", "save"),
    *("settle", "snapshot", "store", *BEFORE_TRAINING, "leave"),
)
_LINE_BYTES, _NODE_CHARACTERS = 256, 64
_BEAT_SECONDS = 0.05  # progress within it is said once


class Heartbeat:
    """`beat` costs one system call of a few microseconds, `progressed` a look at the clock, a collective two writes to
    memory; without a folder all of it costs nothing. Processes with the same `stage` have the same work to do.

    Until `close` it hears of all work that this thread waits for (`alive`)."""

    def __init__(
        self, folder: Path | None, rank: int, stage: int = 0, device: torch.device | None = None, step: int = 0
    ) -> None:
        """`step` is the last one that was made, if that is known."""
        self._rank, self._stage, self._step, self._descriptor = rank, stage, step, -1
        self._phase, self._said = "start", 0.0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._node = platform.node()[:_NODE_CHARACTERS]
        path = folder / f"rank-{rank:05d}"
        self._page = PageWriter(path.with_suffix(".work"))
        self._own_time = OwnTime(clock_of(device or torch.device("cpu")))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.pwrite(self._descriptor, b"\n".rjust(_LINE_BYTES), 0)  # later ones find their place on a disk that is full
        self._stacks = path.with_suffix(".stack").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        alive.listen(self)

    @classmethod
    def of_environment(cls, rank: int | None = None, step: int = 0) -> Heartbeat:
        """For this process, as whoever started it says."""
        folder, here = os.environ.get(FOLDER_VARIABLE), int(os.environ.get("RANK", "0"))
        return cls(Path(folder) if folder else None, here if rank is None else rank, step=step)

    def placed(self, stage: int, device: torch.device) -> None:
        """Where in the layout this process is, once that is known."""
        self._stage = stage
        if self._descriptor >= 0:
            self._own_time = OwnTime(clock_of(device))

    @contextmanager
    def listening(self, everyone: str) -> Iterator[None]:
        """Note this thread's collectives as they happen, and how long it waits in them. `everyone`: the layout."""
        if self._descriptor < 0:
            yield
            return
        with heard_by(self, everyone):
            yield

    def begin_step(self, step: int) -> None:
        """`step` counts from 1 and names the one that is made now."""
        self._step = step
        if self._descriptor >= 0:
            for known in self._own_time.begin_step(step):
                self._page.write_step(known)
        self.beat("data")

    def beat(self, phase: str) -> None:
        """One of PHASES begins."""
        self._phase = phase
        if self._descriptor >= 0:
            self._say(time.monotonic())
            self._own_time.begin_phase(phase)

    def begin(self, phase: str) -> str:
        """As `beat`, unless it has begun already; returns the phase before."""
        before = self._phase
        if phase != before:
            self.beat(phase)
        return before

    def progressed(self) -> None:
        """A piece of the phase's work is done."""
        now = time.monotonic()
        if self._descriptor >= 0 and now - self._said > _BEAT_SECONDS:
            self._say(now)

    def _say(self, now: float) -> None:
        """The line has a fixed length and is written at once: readers see the old or the new."""
        self._said = now
        beat = {
            "rank": self._rank,
            "pid": os.getpid(),
            "step": self._step,
            "phase": self._phase,
            "at": now,
            "stage": self._stage,
            "node": self._node,
        }
        os.pwrite(self._descriptor, json.dumps(beat).ljust(_LINE_BYTES - 1).encode() + b"\n", 0)

    def entered(self, message: Message) -> Any:
        """A collective begins, or the wait for its end."""
        self._page.write_message(message)
        return self._own_time.begin_wait()

    def left(self, entry: Any) -> None:
        self._own_time.end_wait(entry)
        self._page.write_message_done()

    def close(self) -> None:
        if self._descriptor >= 0:
            alive.forget(self)
            faulthandler.unregister(signal.SIGUSR1)
            self._stacks.close()
            self._page.close()
            os.close(self._descriptor)
            self._descriptor = -1
