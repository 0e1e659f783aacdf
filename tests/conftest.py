"""What every test shares: one thread, so that tests run side by side on a small machine and sums are repeatable."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
