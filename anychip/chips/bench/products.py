"""Rates of matrix products over shapes and dtypes."""

from __future__ import annotations

from functools import partial
from typing import Any

from anychip.chips.bench.timing import Bench, Budget

_SIDES = (128, 256, 512, 1024, 2048, 4096, 8192)
_THIN = (16, 64, 256)  # one short side shows how fast small micro-batches, heads and shards are
_WIDE = (1024, 4096)
SHAPES = sorted(
    {(side, side, side) for side in _SIDES}
    | {
        shape
        for thin in _THIN
        for wide in _WIDE
        for shape in ((thin, wide, wide), (wide, thin, wide), (wide, wide, thin))
    }
    | {(2048, 4096, 1024), (2048, 1024, 4096)},
    key=lambda shape: (shape[0] * shape[1] * shape[2], shape),
)  # (m, n, k) of [m, k] x [k, n], smallest first


def measure_products(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """One entry {m, n, k, dtype, flops_per_second} a product, 2 m n k operations each; each dtype has `seconds`, and
    its larger shapes are left out when they do not fit."""
    import torch

    found = []
    for name, dtype in bench.dtypes.items():
        budget = Budget(seconds)
        for m, n, k in SHAPES:
            flops = 2.0 * m * n * k
            if budget.allows(flops):
                left = torch.randn(m, k, device=bench.device).to(dtype)
                right = torch.randn(n, k, device=bench.device).to(dtype).t()  # weights stand as [out, in]
                time = bench.median_seconds(partial(torch.matmul, left, right), seconds / 40)
                budget.spent(flops, time)
                found.append({"m": m, "n": n, "k": k, "dtype": name, "flops_per_second": flops / time})
            bench.advance()
    return found
