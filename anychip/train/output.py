"""What a process prints must not end training: on a full disk its lines are lost, and training goes on."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return memoryview(data).nbytes


def print_what_fits() -> None:
    """From here on, standard output and standard error leave out what the disk does not take."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        lossy = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(lossy, encoding=stream.encoding, errors="replace", line_buffering=True))
