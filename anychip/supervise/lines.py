"""A file of JSON lines that nothing is lost from while its disk takes nothing: lines wait in memory, in order."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from anychip.files import as_own_line

_AGAIN_SECONDS = 1.0


class Lines:
    """No OSError comes out of it. What waits is written when the disk takes it again: by `catch_up`, or before the next
    line."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._tried = path, deque[bytes](), 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(row).encode() + b"\n")
        self._write(is_last=False)

    def catch_up(self) -> None:
        """Try to write what waits, if a while has passed."""
        if self._waiting and time.monotonic() - self._tried > _AGAIN_SECONDS:
            self._write(is_last=False)

    def close(self) -> None:
        """Try a last time, and say what could not be kept."""
        if self._waiting:
            self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        waited = len(self._waiting) > 1 or self._tried > 0
        try:
            while self._waiting:
                _append(self._path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if is_last or not waited:
                then = "is lost" if is_last else "is kept in memory until it can be"
                text = f"{self._path} cannot be written ({error.strerror}); what it should say {then}"
                print(text, file=sys.stderr, flush=True)
            self._tried = time.monotonic()
            return
        self._tried = 0.0


def _append(path: Path, line: bytes) -> None:
    """All of a line, or nothing; behind what another process left torn. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as handle:
        end = handle.seek(0, os.SEEK_END)
        line = as_own_line(handle, line)
        try:
            if handle.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle.fileno())
        except OSError:
            with suppress(OSError):
                handle.truncate(end)
            raise
