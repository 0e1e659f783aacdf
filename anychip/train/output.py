"""What a process prints must not end training: on a full disk its lines are lost, and training goes on."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anychip.errors import is_of_disk


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not is_of_disk(error):
                raise
            return memoryview(data).nbytes


@contextmanager
def where_there_is_room(what: str) -> Iterator[None]:
    """Around writing a small file that training can do without: a disk that does not take it costs the file alone."""
    try:
        yield
    except OSError as error:
        if not is_of_disk(error):
            raise
        print(f"{what} could not be written ({error.strerror}); training goes on", flush=True)


def print_what_fits() -> None:
    """From here on, standard output and standard error leave out what the disk does not take."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        lossy = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(lossy, encoding=stream.encoding, errors="replace", line_buffering=True))
