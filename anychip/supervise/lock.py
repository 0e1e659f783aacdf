"""One supervisor a run: that of one host, or the coordinator of many."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anychip.errors import InputError, is_of_disk
from anychip.files import lock_alone
from anychip.rundir import RunDirectory

_NAME = "supervise.lock"
_WAIT_SECONDS = 5.0  # a child that a killed supervisor has just forked keeps its files until it runs a program


@contextmanager
def only_supervisor(run: RunDirectory) -> Iterator[None]:
    """Hold the run. Raises InputError while another supervisor does, where the file system has locks."""
    path = run.root / _NAME
    descriptor = _opened(path)
    if descriptor is None:
        yield
        return
    try:
        if not lock_alone(descriptor, _WAIT_SECONDS):
            do = "Wait until it has ended, or end it with SIGTERM, which lets its processes save; then try again."
            raise InputError("another `anychip supervise` holds this run.", where=path, do=do)
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
