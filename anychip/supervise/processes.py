"""The processes of one generation on one host: started together, killed together, never orphaned."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from anychip.launch.sockets import listen
from anychip.parallel.layout import PREFIX_VARIABLE
from anychip.parallel.messages import Message
from anychip.rundir import RunDirectory
from anychip.supervise.decide import kind_of_exit
from anychip.supervise.left import tail
from anychip.supervise.out_of_memory import MemoryKills
from anychip.supervise.watch import Beat, Watched, process_state, read_beat, training_stack
from anychip.train.heartbeat import FOLDER_VARIABLE
from anychip.train.heartbeat_page import read_message, read_steps
from anychip.train.own_time import StepTime

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE_SECONDS = 0.3
_LAST_LINES = 15
_KEPT_HEARTBEATS = 16  # generations; long enough that none of an older one is alive
_FORGET_SECONDS = 1.0  # well within a lease


@dataclass(frozen=True)
class Death:
    """How the first process of a generation failed, or which host was lost. A negative code is a signal."""

    rank: int
    pid: int
    code: int | None
    kind: str  # of kind_of_exit, or lost


class Running(Watched, Protocol):
    """A generation that was started, on this host or on many."""

    number: int

    def node(self, rank: int) -> str: ...
    def last_lines(self, rank: int) -> list[str]: ...
    def show(self) -> None:
        """Pass on what the first process has written since the last call, if it is for this process to do."""

    def finished(self) -> bool: ...
    def death(self) -> Death | None: ...
    def unreachable(self) -> Death | None:
        """A host that has said nothing for too long to be asked why training stands still."""

    def kill(self) -> None:
        """End every process, stopped ones too, and wait until none can be alive."""


@dataclass(frozen=True)
class Place:
    """Where a host's processes stand in the job, and where all of them meet."""

    slots: Sequence[int]  # the chips to use, one process each
    first_rank: int
    world_size: int
    host_number: int
    hosts: int
    address: str
    port: int
    prefix: str  # of all keys in the store: who does not know it meets no one
    more: Mapping[str, str] = field(default_factory=dict)  # further variables


class Generation:
    """This host's processes of one generation. They find each other through a store that ends with the generation: what
    an earlier one wrote cannot reach this one."""

    def __init__(
        self, number: int, place: Place, command: Sequence[str], run: RunDirectory, files: Sequence[int] = ()
    ) -> None:
        """`files` are open files for the processes to inherit. Raises OSError, with nothing started, when the disk does
        not take the files that it begins with."""
        self.number, self._place, self._files = number, place, files
        self.ranks = range(place.first_rank, place.first_rank + len(place.slots))
        self.heartbeats, logs = heartbeat_folder(run, number), run.logs / "ranks"
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = {rank: logs / f"rank-{rank:05d}.log" for rank in self.ranks}
        for log in self._logs.values():
            self._begin_log(log)
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        if place.first_rank == 0:  # of all hosts one
            forget_old_heartbeats(run)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._memory, self._deaths = MemoryKills(), dict[int, Death]()
        self._dumped = dict.fromkeys(self.ranks, 0)  # bytes of stacks that were there before SIGUSR1
        self._steps_read = dict.fromkeys(self.ranks, 0)
        self._shown: BinaryIO | None = None
        if 0 in self._logs:
            self._shown = self._logs[0].open("rb")
            self._shown.seek(0, os.SEEK_END)
        try:
            for rank, slot in zip(self.ranks, place.slots, strict=True):
                self._processes[rank] = self._start(rank, slot, command)
        except BaseException:
            self.kill()
            raise

    def _begin_log(self, path: Path) -> None:
        with path.open("ab", buffering=0) as log:
            end, line = log.tell(), f"--- generation {self.number}\n".encode()
            if log.write(line) != len(line):
                log.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _start(self, rank: int, slot: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        place = self._place
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(slot),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(len(place.slots)),
            "GROUP_RANK": str(place.host_number),
            "GROUP_WORLD_SIZE": str(place.hosts),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": str(place.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
            PREFIX_VARIABLE: place.prefix,
            FOLDER_VARIABLE: str(self.heartbeats),
            **place.more,
        }
        if place.world_size > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        with self._logs[rank].open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._files,
                start_new_session=True,  # a terminal's interrupt reaches the supervisor alone, which passes it on
                preexec_fn=die_with(os.getpid()),
            )

    @property
    def size(self) -> int:
        return len(self._processes)

    def node(self, rank: int) -> str:
        return platform.node()

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def code(self, rank: int) -> int | None:
        return self._processes[rank].poll()

    def beats(self) -> list[Beat]:
        paths = [self.heartbeats / f"rank-{rank:05d}" for rank in self.ranks]
        return [beat for path in paths if (beat := read_beat(path)) is not None]

    def states(self) -> dict[int, str]:
        return {rank: self.state(rank) for rank in self.ranks}

    def state(self, rank: int) -> str:
        return process_state(self.pid(rank))

    def stack(self, rank: int) -> list[str]:
        return training_stack(self._path(rank, ".stack"), self._dumped[rank])

    def message(self, rank: int) -> tuple[Message, bool] | None:
        return read_message(self._path(rank, ".work"))

    def new_steps(self) -> list[tuple[int, StepTime]]:
        read = {rank: read_steps(self._path(rank, ".work"), after) for rank, after in self._steps_read.items()}
        self._steps_read |= {rank: rows[-1].number for rank, rows in read.items() if rows}
        return [(rank, row) for rank, rows in read.items() for row in rows]

    def _path(self, rank: int, suffix: str) -> Path:
        return self.heartbeats / f"rank-{rank:05d}{suffix}"

    def last_lines(self, rank: int) -> list[str]:
        lines = tail(self._logs[rank]).splitlines()
        begun = max((at for at, line in enumerate(lines) if line.startswith("--- generation ")), default=-1)
        return [line for line in lines[begun + 1 :] if line.strip()][-_LAST_LINES:]

    def show(self) -> None:
        try:
            text = self._shown.read() if self._shown else b""
        except OSError:  # a disk that cannot be read now
            return
        if text:
            sys.stdout.write(text.decode("utf-8", "replace"))
            sys.stdout.flush()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def finished(self) -> bool:
        return all(process.poll() == 0 for process in self._processes.values())

    def death(self) -> Death | None:
        """The process that failed first, as far as codes tell: its fellows, which lost it, fail a moment later."""
        if not any(self.code(rank) not in (None, 0) for rank in self.ranks):
            return None
        self.pause(_GRACE_SECONDS)
        return first_death([death for rank in self.ranks if (death := self.death_of(rank)) is not None])

    def unreachable(self) -> Death | None:
        return None

    def death_of(self, rank: int) -> Death | None:
        """How this process failed; None while it runs and when it ended well."""
        code, pid = self.code(rank), self.pid(rank)
        if code and rank not in self._deaths:  # the kernel's counter tells once
            out_of_memory = self._memory.ran_out(pid, code, self.last_lines(rank))
            self._deaths[rank] = Death(rank, pid, code, kind_of_exit(code, out_of_memory=out_of_memory))
        return self._deaths.get(rank)

    def signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            paths = {rank: self._path(rank, ".stack") for rank in self.ranks}
            self._dumped = {rank: path.stat().st_size if path.is_file() else 0 for rank, path in paths.items()}
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        self._end_processes()
        self.show()
        if self._shown:
            self._shown.close()
            self._shown = None

    def _end_processes(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()


def first_death(deaths: Sequence[Death]) -> Death:
    """The one of several deaths, of about the same time, that tells the cause: a lost host, a signal, a suspicion, a
    refusal, any other error, which may be but the loss of a fellow, and last who left because it was asked to."""
    order = {"lost": 0, "oom": 1, "crash": 1, "suspect": 2, "bad_input": 3, "unfit": 3, "disk": 3, "preempted": 5}
    return min(deaths, key=lambda death: (order.get(death.kind, 4), death.rank))


def heartbeat_folder(run: RunDirectory, generation: int) -> Path:
    return run.logs / "heartbeats" / f"generation-{generation:04d}"


def generation_number(folder: Path) -> int:
    """Of a folder of heartbeats; 0 for any other."""
    number = folder.name.removeprefix("generation-")
    return int(number) if number.isdecimal() else 0


def heartbeat_folders(run: RunDirectory) -> list[Path]:
    """Those of all generations, the newest last."""
    folders = (run.logs / "heartbeats").glob("generation-*")
    return sorted(filter(generation_number, folders), key=generation_number)


def forget_old_heartbeats(run: RunDirectory) -> None:
    """The newest stay, whose numbers the next one follows. What takes long, on a slow disk, is left to later starts."""
    until = time.monotonic() + _FORGET_SECONDS
    for folder in heartbeat_folders(run)[:-_KEPT_HEARTBEATS]:
        with suppress(OSError):
            for path in folder.iterdir():
                path.unlink()
                if time.monotonic() > until:
                    return
            folder.rmdir()


def next_number(run: RunDirectory) -> int:
    """Generations are numbered through all starts of a run, so that no heartbeat is taken for a newer one's."""
    return max(map(generation_number, heartbeat_folders(run)), default=0) + 1


def open_store(address: str) -> tuple[TCPStore, int]:
    """A store for one generation, on one address and a port that the system chooses; returns it and the port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = listen(address, 0)
    port = int(listener.getsockname()[1])
    timeout = timedelta(seconds=60)
    return TCPStore(
        address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    ), port


def die_with(parent: int):  # type: ignore[no-untyped-def]
    """What a child runs before its program: the kernel kills it when the parent dies, however that dies."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    return ask


def train_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "anychip", "train", *arguments]
