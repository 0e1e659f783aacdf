"""Memory bandwidth, by a copy too large for caches."""

from __future__ import annotations

from anychip.chips.bench.timing import Bench

_HOST_BYTES, _DEVICE_BYTES = 1 << 28, 1 << 30


def measure_memory(bench: Bench) -> float:
    """GB/s (10^9 bytes) of a copy, what is read and what is written both counted."""
    import torch

    size = _HOST_BYTES if bench.device.type == "cpu" else _DEVICE_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / bench.median_seconds(lambda: target.copy_(source)) / 1e9
