"""One generation of a job's processes: started together, killed together, never orphaned."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from anychip.launch.rendezvous import listen
from anychip.train.heartbeat import FOLDER_VARIABLE

_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE_SECONDS = 0.3


@dataclass(frozen=True)
class Death:
    """How the first process of a generation failed. A negative code is a signal."""

    rank: int
    pid: int
    code: int


class Generation:
    """Processes that found each other through a store of their own, on loopback, which ends with them: what an earlier
    generation wrote cannot reach this one."""

    def __init__(self, number: int, slots: Sequence[int], command: Sequence[str], logs: Path, heartbeats: Path) -> None:
        """`slots` are the chips of this host to use, one process each."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.number, self.heartbeats = number, heartbeats
        logs.mkdir(parents=True, exist_ok=True)
        heartbeats.mkdir(parents=True, exist_ok=True)
        listener = listen(_HOST, 0)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            _HOST, port, None, True, timedelta(seconds=60), wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.logs = [logs / f"rank-{rank:05d}.log" for rank in range(len(slots))]
        self.processes = [self._start(rank, slot, len(slots), port, command) for rank, slot in enumerate(slots)]

    def _start(
        self, rank: int, slot: int, world_size: int, port: int, command: Sequence[str]
    ) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(slot),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
            FOLDER_VARIABLE: str(self.heartbeats),
        }
        if world_size > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        with self.logs[rank].open("ab") as log:
            log.write(f"--- generation {self.number}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's interrupt reaches the supervisor alone, which passes it on
                preexec_fn=_die_with(os.getpid()),
            )

    def finished(self) -> bool:
        return all(process.poll() == 0 for process in self.processes)

    def death(self) -> Death | None:
        """The process that failed first, as far as codes tell: its fellows, which lost it, fail a moment later."""
        if not any(process.poll() not in (None, 0) for process in self.processes):
            return None
        time.sleep(_GRACE_SECONDS)
        ended = [(rank, p.pid, p.poll()) for rank, p in enumerate(self.processes)]
        failed = [Death(rank, pid, code) for rank, pid, code in ended if code]
        return min(failed, key=lambda death: (_severity(death.code), death.rank))

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End every process, stopped ones too, and wait for it."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _severity(code: int) -> int:
    """Which of several exit codes tells the cause: a signal, then a refusal, then any other error."""
    return 0 if code < 0 else 1 if code in (2, 3) else 2


def _die_with(parent: int):  # type: ignore[no-untyped-def]
    """What a child runs before its program: the kernel kills it when the parent dies, however that dies."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    return ask


def train_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "anychip", "train", *arguments]
