"""What can be seen of a run from outside: its generations and the beats of their processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from anychip.rundir import RunDirectory
from anychip.supervise.chaos.hosts import RunningHosts
from anychip.supervise.processes import heartbeat_folders, next_number
from anychip.supervise.watch import Beat, process_state, read_beat
from anychip.train.heartbeat import BEFORE_TRAINING

RECOVERY_SECONDS = 300.0
_POLL_SECONDS = 0.005
_Found = TypeVar("_Found")


class Sight:
    """Looks, and waits. `broken` is what did not hold, in words."""

    def __init__(self, run: RunDirectory, hosts: RunningHosts) -> None:
        self._run, self._hosts = run, hosts
        self.broken: list[str] = []

    def generations(self) -> list[Path]:
        """The folders of heartbeats that are left, oldest first."""
        return heartbeat_folders(self._run)

    def newest(self) -> int:
        """The number of the newest generation; 0 before there is one."""
        return next_number(self._run) - 1

    def beat(self, rank: int) -> Beat | None:
        """The newest beat of a process of the newest generation that is alive and came to training."""
        trains = (beat for beat in self.beats() if beat.phase not in BEFORE_TRAINING)
        return next((beat for beat in trains if beat.rank == rank), None)

    def beats(self) -> list[Beat]:
        found = [read_beat(path) for folder in self.generations()[-1:] for path in _files(folder)]
        return [beat for beat in found if beat is not None and process_state(beat.pid) not in ("", "Z")]

    def another_beat(self, last: Beat) -> Beat | None:
        beat = self.beat(last.rank)
        return None if beat == last else beat

    def wait(self, found: Callable[[], _Found | None]) -> _Found | None:
        """What `found` finds at last; None when a host ended first."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            if (it := found()) is not None:
                return it
            if self._hosts.any_ended():
                return None
            time.sleep(_POLL_SECONDS)
        self.broken.append(f"no recovery within {RECOVERY_SECONDS:.0f} s")
        return None

    def gone(self, beat: Beat) -> None:
        """Wait for the end of a process."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while process_state(beat.pid) not in ("", "Z"):
            if time.monotonic() > deadline:
                self.broken.append(f"process {beat.pid} was never ended")
                return
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def without_restart(self, what: str) -> Iterator[None]:
        before = self.newest()
        yield
        if self.newest() != before:
            self.broken.append(f"{what} led to a restart")

    def check_alone(self) -> None:
        """Only the newest generation lives."""
        for folder in self.generations()[:-1]:
            for path in _files(folder):
                beat = read_beat(path)
                if beat is not None and _is_rank_of(beat.pid, folder):
                    self.broken.append(f"process {beat.pid} of {folder.name} outlived it")


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.glob("rank-*") if not path.suffix]
    except FileNotFoundError:  # old, and removed in this moment
        return []


def _is_rank_of(pid: int, folder: Path) -> bool:
    """Whether a process of this number is one that this generation started."""
    try:
        return f"ANYCHIP_HEARTBEATS={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
