"""What a run may not leave behind on its hosts: processes, listening sockets, shared memory that nobody holds."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

_SHARED = Path("/dev/shm")
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_LISTENS = "0A"  # a state in /proc/net/tcp


class Leftovers:
    """Of processes that have `mark`, a path of their own, in their environment or on their command line. To be made
    before they start."""

    def __init__(self, mark: Path) -> None:
        self._mark, self._before = str(mark).encode(), set(_segments())
        self._listened: dict[str, str] = {}

    def look(self) -> None:
        """Note where the processes listen now."""
        listening = _listening()
        for pid in self._processes():
            self._listened |= {inode: listening[inode] for inode in _sockets(pid) & listening.keys()}

    def found(self, seconds: float = 20.0) -> list[str]:
        """What is still there after this time at most, in words."""
        assert self._listened, "nobody was ever seen to listen: the check would find nothing"
        deadline = time.monotonic() + seconds
        while (found := list(self._now())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _now(self) -> Iterator[str]:
        yield from (f"process {pid}" for pid in self._processes())
        yield from (f"port {self._listened[inode]}" for inode in self._listened.keys() & _listening().keys())
        new = set(_segments()) - self._before
        yield from (f"shared memory {name}" for name in new - _held() if new)

    def _processes(self) -> Iterator[int]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = any(self._mark in (path / name).read_bytes() for name in ("cmdline", "environ"))
            except OSError:
                continue
            if marked and int(path.name) != os.getpid():
                yield int(path.name)


def _segments() -> Iterator[str]:
    """Copies in memory are folders, and may outlive processes."""
    return (entry.name for entry in os.scandir(_SHARED) if entry.is_file(follow_symlinks=False))


def _held() -> set[str]:
    """Segments that a living process maps or has open: other work of this machine."""
    held: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        for place in ("map_files", "fd"):
            try:
                links = [link.readlink() for link in (process / place).iterdir()]
            except OSError:
                continue
            held |= {link.name for link in links if link.parent == _SHARED}
    return held


def _listening() -> dict[str, str]:
    """Ports by the number of their socket."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in _table(name)]
    return {words[9]: str(int(words[1].rpartition(":")[2], 16)) for words in lines if words[3] == _LISTENS}


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []


def _sockets(pid: int) -> set[str]:
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {found[1] for link in links if (found := _SOCKET.fullmatch(link))}
