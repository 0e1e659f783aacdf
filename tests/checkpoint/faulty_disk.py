"""A disk that fails, or a process that dies, at the k-th system call of a save."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = (
    "open", "write", "pwrite", "preadv", "lseek", "fsync", "fdatasync", "posix_fadvise", "rename", "replace",
    "unlink", "mkdir", "rmdir", "chmod", "scandir", "listdir",
)  # fmt: skip


class FaultyDisk:
    """Replaces the calls of module `os` that a save makes, and counts them.

    At call number `at`, `act` runs instead of the call. What a power cut may lose is tracked: the contents of files
    not flushed since their last write, and renames whose directory was not flushed since.
    """

    def __init__(self, at: int, act: Callable[[FaultyDisk, str], None]) -> None:
        self.count, self._at, self._act = 0, at, act
        self._lock = threading.RLock()
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
        self._dirty: dict[int, int] = {}  # descriptor -> a duplicate that survives its closing
        self._never_flushed: list[int] = []
        self._renames: list[tuple[Path, Path]] = []

    def __enter__(self) -> FaultyDisk:
        for name in CALLS:
            setattr(os, name, self._replacement(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._real.items():
            setattr(os, name, call)

    def _replacement(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:  # while a process dies, its other threads do nothing more
                self.count += 1
                if self.count == self._at:
                    self._act(self, name)
            result = self._real[name](*arguments, **options)
            with self._lock:
                self._track(name, arguments, result)
            return result

        return call

    def _track(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            if result in self._dirty:  # the number is free again: that file was closed without a flush
                self._never_flushed.append(self._dirty.pop(result))
            if arguments[1] & (os.O_WRONLY | os.O_RDWR):
                self._dirty[result] = os.dup(result)
        elif name in ("fsync", "fdatasync"):
            path = Path(f"/proc/self/fd/{arguments[0]}").resolve()
            self._renames = [(old, new) for old, new in self._renames if new.parent != path]
            self._dirty.pop(arguments[0], None)
        elif name in ("rename", "replace"):
            self._renames.append((Path(arguments[0]).absolute(), Path(arguments[1]).absolute()))

    def lose_power(self, undo_renames: bool) -> None:
        """Lose the contents, and if asked the renames, that were not flushed, then die."""
        for descriptor in [*self._dirty.values(), *self._never_flushed]:
            os.ftruncate(descriptor, 0)
        for old, new in reversed(self._renames):
            if undo_renames and new.exists() and old.parent.exists():
                self._real["rename"](new, old)
        os._exit(9)
