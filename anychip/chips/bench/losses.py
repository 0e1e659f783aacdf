"""Time of the loss over a vocabulary: on a CPU its exponentials take longer than its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anychip.chips.bench.timing import median_seconds
from anychip.chips.operators import operators_for

if TYPE_CHECKING:
    import torch

_TOKENS, _VOCABULARY = 512, 32_768


def measure_losses(
    vendor: str,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    synchronize: Callable[[], None],
    seconds: float,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """One entry {tokens, vocabulary, dtype, seconds} a dtype of the logits: cross-entropy and its gradient in fp32."""
    import torch

    cross_entropy = operators_for(vendor).cross_entropy
    target = torch.arange(_TOKENS, device=device)
    found = []
    for name, dtype in dtypes.items():
        logits = torch.randn(_TOKENS, _VOCABULARY, device=device).to(dtype)
        time = median_seconds(
            lambda x=logits: cross_entropy(x, target, with_gradient=True),  # type: ignore[misc]
            synchronize,
            seconds / len(dtypes),
        )
        found.append({"tokens": _TOKENS, "vocabulary": _VOCABULARY, "dtype": name, "seconds": time})
        advance()
    return found
