"""Memory bandwidth, by a copy too large for caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from anychip.chips.bench.timing import median_seconds

if TYPE_CHECKING:
    import torch

_HOST_BYTES, _DEVICE_BYTES = 1 << 28, 1 << 30


def measure_memory(device: torch.device, synchronize: Callable[[], None]) -> float:
    """GB/s (10^9 bytes) of a copy, what is read and what is written both counted."""
    import torch

    size = _HOST_BYTES if device.type == "cpu" else _DEVICE_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), synchronize) / 1e9
