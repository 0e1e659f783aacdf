"""What one process computes, measured: alone on the chip, or beside others on its share of a CPU."""

from __future__ import annotations

from typing import Any

from anychip.chips.bench.attention import measure_attention
from anychip.chips.bench.losses import measure_losses
from anychip.chips.bench.memory import measure_memory
from anychip.chips.bench.pointwise import measure_pointwise
from anychip.chips.bench.products import measure_products
from anychip.chips.bench.timing import Bench


def measure_computing(bench: Bench, seconds: float) -> dict[str, Any]:
    """{gemm, attention, loss, pointwise, memory_gb_per_s}, as in `measure_chip`, in about `seconds`."""
    each = seconds / len(bench.dtypes)
    return {
        "gemm": measure_products(bench, 0.7 * each),
        "attention": measure_attention(bench, 0.23 * each),
        "loss": measure_losses(bench, 0.035 * each),
        "pointwise": measure_pointwise(bench, 0.035 * each),
        "memory_gb_per_s": measure_memory(bench),
    }
