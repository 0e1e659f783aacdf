"""Points of a process's life at which a fault can strike it: where one of these functions is called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

_CHECKPOINT, _MEMORY = "anychip.train.checkpoint", "anychip.train.memory"

# Module, class ("" for none), function.
STARTING = {
    "rendezvous": ("anychip.parallel.processes", "Processes", "join_here"),
    "restore": ("anychip.train.saves", "Saves", "restore"),
    "load": (f"{_CHECKPOINT}.store", "CheckpointStore", "load"),
}
SAVING = {
    "copy": (f"{_CHECKPOINT}.staging", "StagingBuffer", "copy"),
    "plan": (f"{_CHECKPOINT}.store", "", "write_checkpoint"),
    "open": (f"{_CHECKPOINT}.shard", "ShardWriter", "__init__"),
    "write": (f"{_CHECKPOINT}.shard", "ShardWriter", "add"),
    "flush": (f"{_CHECKPOINT}.shard", "ShardWriter", "finish"),
    "publish": (f"{_CHECKPOINT}.save", "", "publish"),
    "retain": (f"{_CHECKPOINT}.store", "CheckpointStore", "_retain"),
}
# Starts come to `find`, from memory to `fetch`; copies of several hosts to `verify`; a host's first rank to `remove`.
REMEMBERING = {
    "memory_write": (f"{_MEMORY}.copies", "", "write_part"),
    "memory_send": (f"{_MEMORY}.copies", "", "move_files"),
    "memory_verify": (f"{_MEMORY}.copies", "", "accept_part"),
    "memory_remove": (f"{_MEMORY}.copies", "", "copies_in"),
    "memory_find": (f"{_MEMORY}.copies", "", "find_whole_copies"),
    "memory_fetch": (f"{_MEMORY}.copies", "MemoryCopies", "fetch"),
}
SPOTS = STARTING | SAVING | REMEMBERING
OF_THE_FIRST = ("publish", "memory_remove")  # only rank 0 comes there, and the first rank of a host


def surround(spot: tuple[str, str, str], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrapper(function)` in the place of a function."""
    module, holder, name = spot
    place: Any = importlib.import_module(module)
    place = getattr(place, holder) if holder else place
    wrapped = wrapper(getattr(place, name))
    bound = holder and isinstance(inspect.getattr_static(place, name), classmethod)
    setattr(place, name, staticmethod(wrapped) if bound else wrapped)


def before(action: Callable[[], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper for `surround` that calls `action` first."""

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def surrounded(*inputs: Any, **named: Any) -> Any:
            action()
            return function(*inputs, **named)

        return surrounded

    return wrapper
