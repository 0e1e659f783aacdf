"""Time of one matrix product from its shape.

A product of M x K by K x N spends its FLOPs at a fraction of the peak and moves its operands once. Small outputs leave
cores idle: `matmul_half_area` is the output area at which half of them work. A long K can be cut, so that idle cores
take a part of it; a short one hardly fills the pipeline before the tile must be written (`matmul_fill_length`). The
rest is a roofline whose two sides add up, which is what pipelined kernels with imperfect overlap show.
"""

from __future__ import annotations

import numpy as np

from anychip.plan.table import Hardware
from anychip.plan.types import Floats, Site

CUT_LENGTH = 4096.0  # K from which libraries cut it for idle cores


def product_seconds(
    m: Floats, n: Floats, k: Floats, hardware: Hardware, site: Site, count: Floats | float = 1.0
) -> Floats:
    """Seconds of `count` products of [m, k] by [k, n] that run together, such as experts or heads."""
    area = m * n
    flops = 2.0 * area * k * count
    narrow = 1.0 - hardware.low_precision * (1.0 - site.low_precision_efficiency)
    long = np.maximum(k, 1.0)
    idle = site.matmul_half_area / np.maximum(area * count, 1.0) * np.minimum(1.0, CUT_LENGTH / long)
    wasted = 1.0 + idle + site.matmul_fill_length / long
    moved = hardware.element * (m * k + k * n + area) * count
    return np.asarray(
        flops * wasted / (hardware.peak * site.matmul_efficiency * narrow)
        + site.matmul_traffic * moved / (hardware.bandwidth * site.memory_efficiency)
    )


def linear_seconds(
    tokens: Floats, out: Floats, into: Floats, hardware: Hardware, site: Site, count: Floats | float = 1.0
) -> tuple[Floats, Floats, Floats]:
    """Seconds of a linear layer's forward product, of its input gradient and of its weight gradient."""
    return (
        product_seconds(tokens, out, into, hardware, site, count),
        product_seconds(tokens, into, out, hardware, site, count),
        product_seconds(out, into, tokens, hardware, site, count),
    )
