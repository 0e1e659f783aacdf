"""Work that takes long says when a piece of it is done, to whoever counts this process as alive.

Code of any room calls `progressed` after a bounded piece of work: a batch, some megabytes, a tensor. Without a listener
that is a test of a variable. Only work that the rest of the process waits for counts: a checkpoint that is written
behind training says nothing of training, until training waits for it. No timer ever calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Listener(Protocol):
    """`begin` is told of a phase that begins and returns the one before, `progressed` is told of progress in it; the
    first by one thread, the second by any."""

    def begin(self, phase: str) -> str: ...

    def progressed(self) -> None: ...


class Task:
    """What one or more threads do together; `counts` while the process waits for it."""

    def __init__(self) -> None:
        self.counts = False


_listener: Listener | None = None
_here = threading.local()


def listen(listener: Listener) -> None:
    """From here on this thread's work is what this process does, and the listener is told of it."""
    global _listener
    _listener = listener
    task_here().counts = True


def forget(listener: Listener) -> None:
    """The listener wants to hear no more; called by the thread that let it listen."""
    global _listener
    if _listener is listener:
        _listener = None
        task_here().counts = False


def progressed() -> None:
    """A piece of this thread's work is done."""
    if _listener is not None and task_here().counts:
        _listener.progressed()


def begin(phase: str) -> str:
    """A phase of the process's work begins; returns the one before. Ignored in work that it does not wait for."""
    if phase and _listener is not None and task_here().counts:
        return _listener.begin(phase)
    return ""


def task_here() -> Task:
    """What this thread works at."""
    task: Task | None = getattr(_here, "task", None)
    if task is None:
        task = _here.task = Task()
    return task


def work_at(task: Task) -> None:
    """From here on this thread works at a task of others."""
    _here.task = task


@contextmanager
def waiting_for(task: Task, phase: str) -> Iterator[None]:
    """While this thread does nothing but wait for another's task, that one's progress is its own, and its phase this
    one."""
    before = begin(phase)
    task.counts = task_here().counts
    try:
        yield
    finally:
        task.counts = False
        begin(before)
