"""Products by their shape: idle cores, short inner lengths, and operands that must be moved."""

from __future__ import annotations

import numpy as np
import pytest
from plan.workloads import SITE, machine

from anychip.plan.gemm import CUT_LENGTH, product_seconds
from anychip.plan.table import hardware_of

HARDWARE = hardware_of([machine(8)], ["bf16"])
PEAK = 313e12 * SITE.matmul_efficiency


def wasted(m: float, n: float, k: float) -> float:
    """Time of the arithmetic over what the site's efficiency alone would take."""
    moved = 2.0 * (m * k + k * n + m * n) / (float(HARDWARE.bandwidth) * SITE.memory_efficiency)
    sizes = (np.array([size]) for size in (m, n, k))
    return float((product_seconds(*sizes, HARDWARE, SITE)[0] - moved) * PEAK / (2 * m * n * k))


def test_a_large_product_runs_at_the_sites_efficiency() -> None:
    assert wasted(65_536, 65_536, 8192) == pytest.approx(1.0, abs=0.01)


def test_half_the_cores_work_at_the_half_area() -> None:
    side = SITE.matmul_half_area**0.5
    assert wasted(side, side, CUT_LENGTH) == pytest.approx(2.0 + SITE.matmul_fill_length / CUT_LENGTH)


def test_idle_cores_take_a_part_of_a_long_inner_length() -> None:
    side = SITE.matmul_half_area**0.5
    assert wasted(side, side, 4 * CUT_LENGTH) == pytest.approx(1.25 + SITE.matmul_fill_length / (4 * CUT_LENGTH))


def test_a_short_inner_length_does_not_fill_the_pipeline() -> None:
    assert wasted(65_536, 65_536, SITE.matmul_fill_length) == pytest.approx(2.0, abs=0.01)
