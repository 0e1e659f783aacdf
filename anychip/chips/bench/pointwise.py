"""Time of what one layer does besides products and attention: on a CPU its arithmetic takes longer than its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anychip.chips.bench.timing import Bench
from anychip.chips.operators import operators_for

if TYPE_CHECKING:
    import torch

LAYER = {
    "tokens": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def measure_pointwise(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """One entry {**LAYER, dtype, seconds} a dtype: two norms, two residual sums, rotations of queries and keys and
    SwiGLU, forward and backward."""
    found = []
    for name, dtype in bench.dtypes.items():
        time = bench.median_seconds(_layer(bench, dtype), seconds)
        found.append({**LAYER, "dtype": name, "seconds": time})
        bench.advance()
    return found


def _layer(bench: Bench, dtype: torch.dtype) -> Callable[[], object]:
    import torch

    operators = operators_for(bench.vendor)
    tokens, hidden, width = LAYER["tokens"], LAYER["hidden_size"], LAYER["head_dim"]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, device=bench.device).to(dtype).requires_grad_()

    x, y, z = leaf(hidden), leaf(hidden), leaf(hidden)
    queries, keys = leaf(LAYER["num_attention_heads"], width), leaf(LAYER["num_key_value_heads"], width)
    gate, up = leaf(LAYER["intermediate_size"]), leaf(LAYER["intermediate_size"])
    weights = [torch.ones(hidden, device=bench.device, requires_grad=True) for _ in range(2)]
    angles = torch.rand(tokens, width // 2, device=bench.device)
    cos, sin = angles.cos(), angles.sin()
    leaves = [x, y, z, queries, keys, gate, up, *weights]

    def call() -> object:
        middle = x + y
        outputs = [
            operators.rms_norm(x, weights[0], 1e-5),
            operators.rms_norm(middle, weights[1], 1e-5),
            middle + z,
            operators.rotate(queries, cos, sin),
            operators.rotate(keys, cos, sin),
            operators.swiglu(gate, up),
        ]
        return torch.autograd.grad(outputs, leaves, outputs)

    return call
