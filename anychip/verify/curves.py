"""Two loss curves over a long horizon: did one leave the other, or do they differ as two roundings of one run would?

Rounding sends two runs over the same data on paths whose losses differ from step to step, by amounts that resemble
each other for a while, but do not favour either. So differences are averaged over 16 blocks of equal length, over which
they have been forgotten, and the blocks' mean is compared with its own scatter (Student's t, 15 degrees of freedom),
widened where neighbouring blocks still resemble each other. Asked are the whole curve, its last half and its last
quarter, so that a drift that begins late is seen while it is small; each gets a third of the stated rate of false
alarms. A difference that is certain but too small to matter (`tolerance`, a share of the loss) is no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

BLOCKS = 16
_WINDOWS = {"the whole curve": 1.0, "the last half": 0.5, "the last quarter": 0.25}


@dataclass(frozen=True)
class CurveVerdict:
    """`difference` is the second run's mean loss minus the first's over `window` (nats), `needed` how large it had to
    be for an alarm. `judged` is False for curves too short to be judged."""

    judged: bool
    diverged: bool
    window: str
    difference: float
    needed: float
    steps: int
    false_alarms: float

    def describe(self) -> str:
        if not self.judged:
            return f"loss curves: {self.steps} common steps are too few to judge (at least {BLOCKS * 4})"
        if math.isinf(self.difference):
            return f"loss curves: one of them is not finite, in {self.window}"
        state = "DIVERGE" if self.diverged else "agree"
        return (
            f"loss curves {state} over {self.steps} steps: {self.difference:+.5f} nats in {self.window}, "
            f"{self.needed:.5f} needed for an alarm ({self.false_alarms:.1%} false alarms)"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_curves(
    first: Mapping[int, float], second: Mapping[int, float], *, false_alarms: float = 0.01, tolerance: float = 0.001
) -> CurveVerdict:
    """Judge two curves by step. `false_alarms`: the largest chance of an alarm when nothing is wrong."""
    steps = sorted(set(first) & set(second))
    one, other = (np.array([curve[step] for step in steps], dtype=np.float64) for curve in (first, second))
    if len(steps) < BLOCKS * 4:
        return CurveVerdict(False, False, "the whole curve", 0.0, 0.0, len(steps), false_alarms)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        both = bool((np.isfinite(one) == np.isfinite(other)).all())
        return CurveVerdict(True, not both, "the whole curve", math.inf, 0.0, len(steps), false_alarms)
    quantile = student_quantile(1 - false_alarms / len(_WINDOWS) / 2, BLOCKS - 1)
    verdicts = []
    for window, share in _WINDOWS.items():
        kept = round(len(steps) * share)
        if kept < BLOCKS * 4:
            continue
        difference, needed = _judge(other[-kept:] - one[-kept:], quantile)
        needed += tolerance * float(np.abs(one[-kept:]).mean())
        verdicts.append(
            CurveVerdict(True, abs(difference) > needed, window, difference, needed, len(steps), false_alarms)
        )
    return max(verdicts, key=lambda v: (v.diverged, abs(v.difference) / max(v.needed, 1e-300)))


def _judge(differences: np.ndarray, quantile: float) -> tuple[float, float]:
    """The mean difference, and how large it must be to count."""
    length = len(differences) // BLOCKS
    blocks = differences[-BLOCKS * length :].reshape(BLOCKS, length).mean(1)
    mean, scatter = blocks.mean(), blocks.std(ddof=1)
    centred = blocks - mean
    likeness = float((centred[1:] * centred[:-1]).sum() / max((centred**2).sum(), 1e-300)) + 1 / BLOCKS
    likeness = min(max(likeness, 0.0), 0.9)  # of a short series the plain estimate is too small by about 1 / n
    widened = scatter / math.sqrt(BLOCKS) * math.sqrt((1 + likeness) / (1 - likeness))
    return float(mean), float(quantile * widened)


@lru_cache
def student_quantile(probability: float, freedom: int) -> float:
    """The t below which Student's distribution has this probability (at least one half)."""
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return high


def _student(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, by Simpson's rule in the angle atan(t / sqrt(freedom))."""
    n = 400
    angle = np.linspace(0.0, math.atan(t / math.sqrt(freedom)), n + 1)
    density = np.cos(angle) ** (freedom - 1)
    weights = np.ones(n + 1)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    area = float((weights * density).sum()) * (angle[1] - angle[0]) / 3
    whole = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) * math.sqrt(math.pi) / 2
    return 0.5 + area / whole / 2
