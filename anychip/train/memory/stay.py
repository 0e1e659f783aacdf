"""Who uses a folder holds a lock on it, so that nobody else removes it.

The lock ends with the process, however that ends; what it starts does not inherit it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def stay_in(folder: Path) -> int:
    """Hold the folder until the descriptor that this returns is closed. Waits for who removes it, and raises
    FileNotFoundError when it is gone then."""
    descriptor = _open(folder)
    try:
        with suppress(OSError):  # a file system without locks: nobody is `alone_in` a folder of it
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            raise FileNotFoundError(folder)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


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
