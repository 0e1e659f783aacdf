"""Whether a process ended for want of memory: by the kernel's word, its control group's, or its own."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

# MemoryError and std::bad_alloc of the host; what PyTorch says of the host's and of a device's memory.
_SAID = re.compile(r"\bMemoryError\b|OutOfMemoryError|std::bad_alloc|[Oo]ut of memory|[Cc]an(?:'t|not) allocate memory")
_RECORD_BYTES = 8192


class MemoryKills:
    """Remembers what the control group had counted before, so that a new kill is told from an old one."""

    def __init__(self, events: Path | None = None, kernel_log: Path = Path("/dev/kmsg")) -> None:
        self._events, self._kernel_log = events or own_events(), kernel_log
        self._before = kills(self._events)

    def ran_out(self, pid: int, code: int, lines: Iterable[str]) -> bool:
        """`lines` are the last ones that the process wrote. Unknown counts as no."""
        if code != -signal.SIGKILL:
            return any(_SAID.search(line) for line in lines)
        return kills(self._events) > self._before or killed_by_kernel(pid, self._kernel_log)


def own_events(process: Path = Path("/proc/self")) -> Path | None:
    """The file in which the control group of this process counts what its memory limit did.

    Version 1 (`memory.oom_control`) where it governs memory, as in openEuler 20.03 and CentOS 7, else version 2
    (`memory.events`). A container sees its group under another name than the host gave it, so the group is looked
    for below the root of the mount (proc(5), mountinfo; cgroups(7)).
    """
    try:
        return _events((process / "cgroup").read_text(), (process / "mountinfo").read_text())
    except (OSError, ValueError):  # not there, or not in the form that they have
        return None


def _events(membership: str, mounts: str) -> Path | None:
    groups = dict(line.split(":", 2)[1:] for line in membership.splitlines())
    first = next((names for names in groups if "memory" in names.split(",")), "")
    kind, option, name = ("cgroup", "memory", "memory.oom_control") if first else ("cgroup2", "", "memory.events")
    for line in mounts.splitlines():
        place, source = line.split(" - ")
        root, point = place.split()[3:5]
        type_, _, options = source.split(" ", 2)
        if type_ == kind and option in ["", *options.split(",")]:
            inside = groups.get(first, "/").removeprefix(root.rstrip("/"))
            own = Path(point, inside.lstrip("/"), name)
            return own if own.exists() else Path(point, name)
    return None


def kills(events: Path | None) -> int:
    """Processes of a control group that were killed at its memory limit; 0 where nobody counts."""
    try:
        lines = events.read_text().splitlines() if events else []
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(found[0]) if found and found[0].isdigit() else 0


def killed_by_kernel(pid: int, log: Path) -> bool:
    """Whether the kernel's log, where it may be read, says that it killed this process."""
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while record := os.read(descriptor, _RECORD_BYTES):  # one record each time
            if re.search(rb"Killed process %d\b" % pid, record):
                return True
    except OSError:  # no more for now, or records that were overwritten meanwhile
        pass
    finally:
        os.close(descriptor)
    return False
