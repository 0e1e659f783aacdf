"""Time of what one layer does besides products and attention: on a CPU its arithmetic takes longer than its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anychip.chips.bench.timing import median_seconds
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


def measure_pointwise(
    vendor: str,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    synchronize: Callable[[], None],
    seconds: float,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """One entry {**LAYER, dtype, seconds} a dtype: two norms, two residual sums, rotations of queries and keys and
    SwiGLU, forward and backward."""
    found = []
    for name, dtype in dtypes.items():
        time = median_seconds(_layer(vendor, device, dtype), synchronize, seconds / len(dtypes))
        found.append({**LAYER, "dtype": name, "seconds": time})
        advance()
    return found


def _layer(vendor: str, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    import torch

    operators = operators_for(vendor)
    tokens, hidden, width = LAYER["tokens"], LAYER["hidden_size"], LAYER["head_dim"]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, device=device).to(dtype).requires_grad_()

    x, y, z = leaf(hidden), leaf(hidden), leaf(hidden)
    queries, keys = leaf(LAYER["num_attention_heads"], width), leaf(LAYER["num_key_value_heads"], width)
    gate, up = leaf(LAYER["intermediate_size"]), leaf(LAYER["intermediate_size"])
    weights = [torch.ones(hidden, device=device, requires_grad=True) for _ in range(2)]
    angles = torch.rand(tokens, width // 2, device=device)
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
