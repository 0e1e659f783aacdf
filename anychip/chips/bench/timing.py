"""Time a call on a device, and stay within a budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FEWEST, _MOST = 3, 50


def median_seconds(call: Callable[[], object], synchronize: Callable[[], None], seconds: float = 0.25) -> float:
    """Median time of a call after one that warms up, from as many as fit into `seconds`, at least 3."""
    call()
    synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _FEWEST or (time.perf_counter() - started < seconds and len(times) < _MOST):
        begin = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@dataclass(frozen=True)
class Bench:
    """What is measured on, in which dtypes by their names; `advance` is called after each case."""

    vendor: str
    device: torch.device
    dtypes: dict[str, torch.dtype]
    synchronize: Callable[[], None]
    advance: Callable[[], None] = lambda: None

    def median_seconds(self, call: Callable[[], object], seconds: float = 0.25) -> float:
        return median_seconds(call, self.synchronize, seconds)


class Budget:
    """Seconds that a group of measurements may take. A case is skipped when its likely time no longer fits, judged by
    the last case's rate: a chip that converts a dtype in software would take minutes for a large case."""

    _SHARE = 5  # one warm-up and the fewest repeats, with some room

    def __init__(self, seconds: float) -> None:
        self._until = time.perf_counter() + seconds
        self._rate: float | None = None

    def allows(self, work: float) -> bool:
        left = self._until - time.perf_counter()
        return left > 0 and (self._rate is None or self._SHARE * work / self._rate < left)

    def spent(self, work: float, seconds: float) -> None:
        """Rates grow with the size of a case, so the newest one is the best guess for a larger case."""
        self._rate = work / seconds
