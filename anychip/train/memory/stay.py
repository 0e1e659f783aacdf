"""Who uses a folder holds a lock on it, so that nobody else removes it.

The lock ends with the process, however that ends. Children have none of it: one that outlives its parent would keep a
folder that nobody uses.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: set[int] = set()


def stay_in(folder: Path) -> int:
    """Hold the folder until `leave` gets what this returns. Waits for who removes it, and raises FileNotFoundError
    when it is gone then."""
    descriptor = _open(folder)
    try:
        with suppress(OSError):  # a file system without locks: nobody is `alone_in` a folder of it
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            raise FileNotFoundError(folder)
    except OSError:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def leave(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether nobody stays in the folder; nobody does before the block ends, then."""
    descriptor = _open(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _leave_to_the_parent() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)
