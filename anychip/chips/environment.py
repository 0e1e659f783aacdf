"""Environment variables that must be set before torch is first imported."""

from __future__ import annotations

import os


def set_thread_environment() -> None:
    """Let threads that wait for each other sleep after a short spin.

    By default GNU OpenMP spins for milliseconds at the end of every parallel operator. On a machine that also does
    something else, spinning threads take the core that the slowest one waits for: training beside one busy process on
    two cores was more than ten times slower. A value that the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
