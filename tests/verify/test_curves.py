"""Loss curves: what rounding makes is let pass as often as promised, a real difference is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anychip.verify.curves import compare_curves, student_quantile


def curve(steps: int) -> np.ndarray:
    return 2.0 + 4.0 * np.arange(1, steps + 1) ** -0.3


def noise(chance: np.random.Generator, steps: int, size: float, likeness: float) -> np.ndarray:
    """AR(1): each difference resembles the one before; it grows over the first tenth, as two paths part."""
    innovations = chance.normal(size=steps) * math.sqrt(1 - likeness**2)
    out = np.zeros(steps)
    for step in range(1, steps):
        out[step] = likeness * out[step - 1] + innovations[step]
    return size * out * np.minimum(1.0, np.arange(steps) / (steps / 10))


def by_step(values: np.ndarray) -> dict[int, float]:
    return {step: float(value) for step, value in enumerate(values, start=1)}


# scipy.stats.t.ppf
@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"), [(0.975, 15, 2.13145), (0.995, 15, 2.94671), (0.975, 1, 12.7062)]
)
def test_quantiles_are_students(probability: float, freedom: int, quantile: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(quantile, rel=1e-4)


@pytest.mark.parametrize("likeness", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("promised", [0.01, 0.05])
def test_false_alarms_are_no_more_than_promised(likeness: float, promised: float) -> None:
    chance, steps, trials = np.random.default_rng(1), 1000, 400
    base = curve(steps)
    alarms = sum(
        compare_curves(
            by_step(base),
            by_step(base + noise(chance, steps, 0.02, likeness)),
            false_alarms=promised,
            tolerance=0.0,
        ).diverged
        for _ in range(trials)
    )
    deviation = math.sqrt(trials * promised * (1 - promised))
    assert alarms <= trials * promised + 3 * deviation


@pytest.mark.parametrize("drift", [0.02, -0.02])
def test_a_late_drift_is_seen(drift: float) -> None:
    """1 % of the loss, gained over the last quarter, in noise of the same size."""
    chance, steps = np.random.default_rng(2), 2000
    base = curve(steps)
    late = drift * np.clip((np.arange(steps) - 0.7 * steps) / (0.1 * steps), 0, 1)
    found = compare_curves(by_step(base), by_step(base + noise(chance, steps, 0.02, 0.5) + late))
    assert found.diverged and found.window == "the last quarter"
    assert found.difference == pytest.approx(drift, rel=0.25)


def test_a_difference_too_small_to_matter_is_no_alarm() -> None:
    base = curve(800)
    assert not compare_curves(by_step(base), by_step(base + 1e-3), tolerance=0.001).diverged
    assert compare_curves(by_step(base), by_step(base + 1e-2), tolerance=0.001).diverged


def test_equal_curves_agree_and_short_ones_are_not_judged() -> None:
    assert not compare_curves(by_step(curve(500)), by_step(curve(500))).diverged
    assert not compare_curves(by_step(curve(40)), by_step(curve(40) + 1)).judged


def test_a_curve_that_ends_in_nan_has_diverged() -> None:
    base = curve(200)
    broken = base.copy()
    broken[150:] = math.nan
    assert compare_curves(by_step(base), by_step(broken)).diverged
