"""Rates of causal attention as training computes it on this chip, forward and with its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anychip.chips.bench.timing import Bench, Budget
from anychip.chips.operators import operators_for
from anychip.chips.operators.contract import Attention

if TYPE_CHECKING:
    import torch

SHAPES = ((1, 8, 512, 64), (1, 8, 1024, 64), (1, 8, 1024, 128), (1, 8, 2048, 128), (1, 8, 4096, 128), (1, 8, 8192, 128))


def measure_attention(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """Entries {batch, heads, seq_length, head_dim, dtype, pass, flops_per_second}. Operations are those of a causal
    model: 2 b h s^2 d forward (half of 4 b h s^2 d), twice that backward; what a kernel recomputes does not count."""
    found: list[dict[str, Any]] = []
    attention = operators_for(bench.vendor).attention
    for name, dtype in bench.dtypes.items():
        _calls(attention, bench, dtype, *SHAPES[0])[1]()  # a kernel may be compiled now
        budget = Budget(seconds)
        for batch, heads, length, width in SHAPES:
            forward = 2.0 * batch * heads * length**2 * width
            if budget.allows(4 * forward):
                shape = {"batch": batch, "heads": heads, "seq_length": length, "head_dim": width, "dtype": name}
                inference, training = _calls(attention, bench, dtype, batch, heads, length, width)
                for kind, call, flops in (("forward", inference, forward), ("forward+backward", training, 3 * forward)):
                    time = bench.median_seconds(call, seconds / 20)
                    found.append({**shape, "pass": kind, "flops_per_second": flops / time})
                budget.spent(3 * forward, time)
            bench.advance()
    return found


def _calls(
    attention: Attention, bench: Bench, dtype: torch.dtype, batch: int, heads: int, length: int, width: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Causal attention, and the same with its backward pass."""
    import torch

    scale = width**-0.5
    q, k, v = (torch.randn(batch, heads, length, width, device=bench.device).to(dtype) for _ in range(3))
    grad = torch.randn(batch, heads, length, width, device=bench.device).to(dtype)

    def inference() -> object:
        with torch.no_grad():
            return attention(q, k, v, scale=scale, causal=True, mask=None)

    def training() -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(leaves[0], leaves[1], leaves[2], scale=scale, causal=True, mask=None)
        return torch.autograd.grad(out, leaves, grad)

    return inference, training
