"""Who this process talks to, seen beneath everything that talks: our own collectives, FSDP2, pipeline schedules.

They all end in methods of ProcessGroup and in Work.wait, so these are where one listens. What operators of C++ send
does not pass there: DTensor's gathers are told by who calls them (`telling`), those in compiled code by nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

# Methods of ProcessGroup, old names and new ones, and what torch.distributed calls them.
_OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "barrier": "barrier",
}
_MOST_UNFINISHED = 1024
_ear: _Ear | None = None


class Message(NamedTuple):
    """A collective, or a message to one other process: the `number`-th of this process, over `group`."""

    number: int
    operation: str
    group: str
    bytes: int

    def describe(self) -> str:
        size = f", {self.bytes:,} bytes" if self.bytes else ""
        return f"{self.operation} number {self.number} over {self.group}{size}"


class Listener(Protocol):
    """`entered` is told what this process is about to do or to wait for; `left` gets what that returned."""

    def entered(self, message: Message) -> Any: ...

    def left(self, entry: Any) -> None: ...


@contextmanager
def heard_by(listener: Listener, everyone: str) -> Iterator[None]:
    """Tell `listener` of every message of this thread, and of threads of the autograd engine. Other threads of Python,
    such as one that writes checkpoints, have conversations of their own. `everyone` is what the layout makes of all
    processes, in words."""
    global _ear
    _ear = _Ear(listener, everyone)
    wrapped = _wrap(dist.ProcessGroup, dist.Work, _ear) if dist.is_available() else []
    try:
        yield
    finally:
        _ear = None
        for owner, name, original in wrapped:
            setattr(owner, name, original)


@contextmanager
def telling(operation: str, axes: str, nbytes: int) -> Iterator[None]:
    """Around a collective that passes no ProcessGroup method, or is made of several: tell who listens, if anyone does,
    of this one and of nothing within it."""
    ear = _ear if _ear and _ear.hears() else None
    if ear is None:
        yield
        return
    entry = ear.enter(operation, axes, nbytes)
    ear.within = True
    try:
        yield
    finally:
        ear.within = False
        ear.leave(entry)


def axes_of(group: dist.ProcessGroup) -> str:
    """The axes of a group made by DeviceMesh, or what its maker calls it."""
    return str(group.group_desc).removeprefix("mesh_")


class _Ear:
    """Numbers messages, and knows which one an unfinished work belongs to."""

    def __init__(self, listener: Listener, everyone: str) -> None:
        self._listener, self._everyone, self._thread = listener, everyone, threading.current_thread()
        self._last = Message(0, "", "", 0)
        self._unfinished: dict[int, Message] = {}
        self.within = False  # a collective that was told of as a whole

    def hears(self) -> bool:
        if self.within:
            return False
        thread = threading.current_thread()
        return thread is self._thread or isinstance(thread, threading._DummyThread)  # one that C++ made

    def enter(self, operation: str, group: str, nbytes: int) -> Any:
        if group == "default_pg":
            group = f"all processes ({self._everyone})"
        self._last = Message(self._last.number + 1, operation, group, nbytes)
        return self._listener.entered(self._last)

    def leave(self, entry: Any) -> None:
        self._listener.left(entry)

    def call(self, operation: str, group: dist.ProcessGroup, original: Callable[..., Any], args: Any, kw: Any) -> Any:
        entry = self.enter(operation, axes_of(group), _bytes(args))
        message = self._last
        try:
            work = original(group, *args, **kw)
        finally:
            self.leave(entry)
        if len(self._unfinished) >= _MOST_UNFINISHED:  # of those that nobody waits for
            self._unfinished.clear()
        self._unfinished[id(work)] = message
        return work

    def wait(self, work: dist.Work, original: Callable[..., Any], args: Any, kw: Any) -> Any:
        entry = self._listener.entered(self._unfinished.pop(id(work), self._last))
        try:
            return original(work, *args, **kw)
        finally:
            self._listener.left(entry)


def _wrap(groups: Any, works: Any, ear: _Ear) -> list[tuple[Any, str, Any]]:
    """Put the ear before the methods; returns what to put back."""
    found = [(groups, name, vars(groups)[name]) for name in _OPERATIONS if name in vars(groups)]
    for _, name, _ in found:
        setattr(groups, name, _listening_call(_OPERATIONS[name], getattr(groups, name), ear))
    found.append((works, "wait", vars(works)["wait"]))
    works.wait = _listening_wait(works.wait, ear)
    return found


def _listening_call(operation: str, original: Callable[..., Any], ear: _Ear) -> Callable[..., Any]:
    @wraps(original)
    def method(group: dist.ProcessGroup, *args: Any, **kw: Any) -> Any:
        return ear.call(operation, group, original, args, kw) if ear.hears() else original(group, *args, **kw)

    return method


def _listening_wait(original: Callable[..., Any], ear: _Ear) -> Callable[..., Any]:
    @wraps(original)
    def method(work: dist.Work, *args: Any, **kw: Any) -> Any:
        return ear.wait(work, original, args, kw) if ear.hears() else original(work, *args, **kw)

    return method


def _bytes(args: Any) -> int:
    """Of the first tensor: it tells a gradient from a flag."""
    value = args[0] if args else None
    while isinstance(value, list) and value:
        value = value[0]
    return int(getattr(value, "nbytes", 0))
