"""A process says what it is doing, so that whoever watches it can tell slow from stuck, and stuck from the cause.

Watchers name a folder in ANYCHIP_HEARTBEATS. Each process keeps one line of JSON there, `rank-00003`, written anew at
every phase of a step, and writes the stacks of its threads to `rank-00003.stack` when it receives SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from pathlib import Path

FOLDER_VARIABLE = "ANYCHIP_HEARTBEATS"
PHASES = ("data", "forward_backward", "reduce", "check", "optimizer", "log", "evaluate", "save")
_LINE_BYTES = 256


class Heartbeat:
    """`beat` costs one system call of a few microseconds; without a folder nothing."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._rank, self._step, self._descriptor = rank, 0, -1
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank:05d}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._stacks = path.with_suffix(".stack").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)

    @classmethod
    def of_environment(cls, rank: int) -> Heartbeat:
        folder = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(folder) if folder else None, rank)

    def begin_step(self, step: int) -> None:
        """`step` counts from 1 and names the one that is made now."""
        self._step = step
        self.beat("data")

    def beat(self, phase: str) -> None:
        """One of PHASES begins. The line has a fixed length and is written at once: readers see the old or the new."""
        if self._descriptor < 0:
            return
        beat = {"rank": self._rank, "pid": os.getpid(), "step": self._step, "phase": phase, "at": time.monotonic()}
        os.pwrite(self._descriptor, json.dumps(beat).ljust(_LINE_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        if self._descriptor >= 0:
            faulthandler.unregister(signal.SIGUSR1)
            self._stacks.close()
            os.close(self._descriptor)
            self._descriptor = -1
