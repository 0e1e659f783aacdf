"""A process says what it is doing, so that whoever watches it can tell slow from stuck, and stuck from the cause.

Watchers name a folder in ANYCHIP_HEARTBEATS. Each process keeps there

    rank-00003         one line of JSON, written anew at every phase of a step
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

from anychip.parallel.messages import Message, heard_by
from anychip.train.heartbeat_page import PageWriter
from anychip.train.own_time import OwnTime, clock_of

FOLDER_VARIABLE = "ANYCHIP_HEARTBEATS"
PHASES = ("data", "answer", "forward_backward", "reduce", "check", "optimizer", "log", "evaluate", "save")
_LINE_BYTES, _NODE_CHARACTERS = 256, 64


class Heartbeat:
    """`beat` costs one system call of a few microseconds, a collective two writes to memory; without a folder all of
    it costs nothing. Processes with the same `stage` have the same work to do."""

    def __init__(self, folder: Path | None, rank: int, stage: int = 0, device: torch.device | None = None) -> None:
        self._rank, self._stage, self._step, self._descriptor = rank, stage, 0, -1
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

    @classmethod
    def of_environment(cls, rank: int, stage: int = 0, device: torch.device | None = None) -> Heartbeat:
        folder = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(folder) if folder else None, rank, stage, device)

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
        """One of PHASES begins. The line has a fixed length and is written at once: readers see the old or the new."""
        if self._descriptor < 0:
            return
        beat = {
            "rank": self._rank,
            "pid": os.getpid(),
            "step": self._step,
            "phase": phase,
            "at": time.monotonic(),
            "stage": self._stage,
            "node": self._node,
        }
        os.pwrite(self._descriptor, json.dumps(beat).ljust(_LINE_BYTES - 1).encode() + b"\n", 0)
        self._own_time.begin_phase(phase)

    def entered(self, message: Message) -> Any:
        """A collective begins, or the wait for its end."""
        self._page.write_message(message)
        return self._own_time.begin_wait()

    def left(self, entry: Any) -> None:
        self._own_time.end_wait(entry)
        self._page.write_message_done()

    def close(self) -> None:
        if self._descriptor >= 0:
            faulthandler.unregister(signal.SIGUSR1)
            self._stacks.close()
            self._page.close()
            os.close(self._descriptor)
            self._descriptor = -1
