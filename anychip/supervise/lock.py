"""One supervisor a run: that of one host, or the coordinator of many."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anychip.errors import InputError, is_of_disk
from anychip.rundir import RunDirectory

_NAME = "supervise.lock"
_WAIT_SECONDS, _POLL_SECONDS = 5.0, 0.1


@contextmanager
def only_supervisor(run: RunDirectory) -> Iterator[None]:
    """Hold the run. Raises InputError while another supervisor does, where the file system has locks."""
    path = run.root / _NAME
    descriptor = _opened(path)
    if descriptor is None:
        yield
        return
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int | None:
    """None while the disk takes no file: starts wait for that, and so the supervisor must go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if not is_of_disk(error):
            raise
        text = f"{path} cannot be written ({error.strerror}): a second supervisor of this run would not be noticed"
        print(text, file=sys.stderr, flush=True)
        return None


def _lock(descriptor: int, path: Path) -> None:
    """Waits a while: a child that a killed supervisor has just forked keeps its files open until it runs a program."""
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                do = "Wait until it has ended, or end it with SIGTERM, which lets its processes save; then try again."
                raise InputError("another `anychip supervise` holds this run.", where=path, do=do) from None
            time.sleep(_POLL_SECONDS)
        except OSError:
            return  # a file system without locks
