"""The coordinator as a process beside an agent: started when nobody listens at its place, and again when it dies."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from anychip.errors import EXIT_DISK
from anychip.supervise.processes import die_with

_CONNECT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
_GOOD_SECONDS = 60.0  # one that lived so long is started again without a wait
_LEAVE_SECONDS = 10.0
_TELL_SECONDS = 2.0


class CoordinatorProcess:
    """`anychip supervise ... --coordinate` as a child, which dies with this process."""

    def __init__(self, host: str, port: int, arguments: Sequence[str]) -> None:
        self._place, self._arguments = (host, port), [sys.executable, "-m", "anychip", "supervise", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._wait, self._ended = 0.0, 0.0, math.inf

    def keep_alive(self, is_there: bool) -> int | None:
        """Start it unless one is there. Its exit code once it has ended by itself, a moment after that: what it told
        this host's agent comes first."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            if code >= 0 and code != EXIT_DISK:
                self._ended = min(self._ended, now)
                return code if now > self._ended + _TELL_SECONDS else None
            self._process = None
            self._wait = 0.0 if now - self._started > _GOOD_SECONDS else min(2 * self._wait + 1, _LONGEST_WAIT_SECONDS)
            why = "ended because of its disk" if code == EXIT_DISK else f"was ended by signal {-code}"
            print(f"the coordinator {why} and is started again", file=sys.stderr, flush=True)
        if is_there or now < self._started + self._wait:
            return None
        self._started, self._wait = now, max(self._wait, _CONNECT_SECONDS)
        if self._is_there():
            return None
        self._process = subprocess.Popen(
            self._arguments, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with(os.getpid())
        )
        return None

    def leave(self) -> None:
        """Let it tell the other hosts what it has to tell, and wait for it."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _is_there(self) -> bool:
        try:
            socket.create_connection(self._place, timeout=_CONNECT_SECONDS).close()
        except OSError:
            return False
        return True
