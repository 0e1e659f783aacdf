"""The history of a run under faults: facts in the order in which they happened, told through a pipe by whoever made
them.

A line goes into the pipe at once, so what a process told before it was killed is there, and what is told of a save does
not depend on the disk that is being hurt. It costs nothing where nobody asks for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import threading
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "ANYCHIP_CHAOS"  # the folder of the history; a process that trains without it takes no part
_PIPE, _LOG = "pipe", "history.jsonl"
_PIPE_BYTES = 1 << 20
_LINE_BYTES = 4096  # a longer one could be torn (PIPE_BUF)
_POLL_SECONDS = 0.1


class Teller:
    """Tells facts; `who` is part of each."""

    def __init__(self, folder: Path, **who: Any) -> None:
        """Raises OSError when nobody listens."""
        self._who, self._pipe = who, os.open(folder / _PIPE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._pipe, True)

    def tell(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, **self._who, **facts}, separators=(",", ":")).encode() + b"\n"
        assert len(line) <= _LINE_BYTES
        os.write(self._pipe, line)


class History:
    """Takes down what is told, while the block runs, in FOLDER/history.jsonl."""

    def __init__(self, folder: Path) -> None:
        self._pipe, self._log, self._stop = folder / _PIPE, folder / _LOG, threading.Event()

    def __enter__(self) -> History:
        self._pipe.parent.mkdir(parents=True)
        os.mkfifo(self._pipe, 0o600)
        self._reader = os.open(self._pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # a writer too: it never ends
        fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._thread = threading.Thread(target=self._take_down, name="history", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._reader)
        self._pipe.unlink()

    def rows(self) -> list[dict[str, Any]]:
        """Everything told, once the block is over."""
        return [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines()]

    def _take_down(self) -> None:
        with self._log.open("ab", buffering=0) as log:
            while True:
                ready, _, _ = select.select([self._reader], [], [], _POLL_SECONDS)
                if ready:
                    log.write(os.read(self._reader, _PIPE_BYTES))
                elif self._stop.is_set():
                    return
