"""What `anychip bench chip` measured of products and attention, put into the site that a calibration starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anychip.errors import InputError
from anychip.plan.calibrate import chip_family
from anychip.plan.local import machine_of_bench, site_of_bench
from anychip.plan.machine import machine_of_chip
from anychip.plan.rows import Run
from anychip.plan.table import peak_of
from anychip.plan.types import Site

_ABOVE_PEAK = 1.05  # that a rate may be measured by accident


def with_measured_products(start: Site, bench: dict[str, Any], runs: Sequence[Run]) -> tuple[Site, tuple[str, ...]]:
    """The start with the measured efficiency, half area and fill length of products and, where it was measured, the
    efficiency of attention; and the names of what is then not to be fitted.

    A bench's efficiencies are shares of the fastest product, a site's those of the peak that the catalogue (or the
    start) states: the quotient of both comes in here. Raises InputError when the bench is of another chip.
    """
    chip = Counter(run.chip for run in runs).most_common(1)[0][0]
    dtype = Counter("bf16" if run.workload.dtype == "fp8" else run.workload.dtype for run in runs).most_common(1)[0][0]
    device, its_chip = bench["device"], bench.get("chip")
    if its_chip and chip_family(its_chip) != chip_family(chip):
        raise InputError(
            f"the products were measured on {its_chip}, and the runs are of {chip}.",
            do="Measure the chip of the runs with `anychip bench chip`.",
        )
    share = peak_of(machine_of_bench(bench, 1, 1.0), dtype) / _stated_peak(start, chip, dtype)
    if share > _ABOVE_PEAK:
        raise InputError(
            f"{device} multiplies {share:.2f} times as fast as the peak of {chip}.",
            do="Measure the chip of the runs with `anychip bench chip`.",
        )
    measured = site_of_bench(bench, dtype)
    values: dict[str, Any] = {
        "matmul_efficiency": min(1.0, measured.matmul_efficiency * share),
        "matmul_half_area": measured.matmul_half_area,
        "matmul_fill_length": measured.matmul_fill_length,
    }
    if any(case["dtype"] == dtype and case["pass"] == "forward+backward" for case in bench.get("attention") or []):
        values["attention_efficiency"] = min(1.0, measured.attention_efficiency * share)
    return replace(start, name=f"{start.name} with products of {device}", **values), tuple(values)


def _stated_peak(start: Site, chip: str, dtype: str) -> float:
    machine = machine_of_chip(chip, 1)
    if not start.peak_tflops and not machine.peak_flops:
        raise InputError(
            f"neither the catalogue nor the site {start.name} knows the peak of {chip}.",
            do="Start from a site that states peak_tflops.",
        )
    return start.peak_tflops * 1e12 or peak_of(machine, dtype)
