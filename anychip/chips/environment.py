"""What a process has around it: variables that must be set before torch is first imported, the running system."""

from __future__ import annotations

import os
from pathlib import Path


def set_thread_environment() -> None:
    """Let threads that wait for each other sleep after a short spin.

    By default GNU OpenMP spins for milliseconds at the end of every parallel operator. On a machine that also does
    something else, spinning threads take the core that the slowest one waits for: training beside one busy process on
    two cores was more than ten times slower. A value that the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def boot_id() -> str:
    """Another one after every start of this system; empty where the system has none. Until then all its processes
    share the clock of time.monotonic."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""
