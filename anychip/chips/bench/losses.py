"""Time of the loss over a vocabulary: on a CPU its exponentials take longer than its bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

from anychip.chips.bench.timing import Bench
from anychip.chips.operators import operators_for

_TOKENS, _VOCABULARY = 512, 32_768


def measure_losses(bench: Bench, seconds: float) -> list[dict[str, Any]]:
    """One entry {tokens, vocabulary, dtype, seconds} a dtype of the logits: cross-entropy and its gradient in fp32."""
    import torch

    cross_entropy = operators_for(bench.vendor).cross_entropy
    target = torch.arange(_TOKENS, device=bench.device)
    found = []
    for name, dtype in bench.dtypes.items():
        logits = torch.randn(_TOKENS, _VOCABULARY, device=bench.device).to(dtype)
        call = partial(cross_entropy, logits, target, with_gradient=True)
        time = bench.median_seconds(call, seconds)
        found.append({"tokens": _TOKENS, "vocabulary": _VOCABULARY, "dtype": name, "seconds": time})
        bench.advance()
    return found
