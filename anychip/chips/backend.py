"""What training asks of a chip. One file beside this one per vendor answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Backend(Protocol):
    """A chip as the rest of the package sees it."""

    vendor: str
    collective_backend: str

    def device(self, local_rank: int) -> torch.device:
        """The device that this process computes on."""

    def multiplies_bf16(self) -> bool:
        """Whether bf16 matrix products run in hardware, rather than by conversion to fp32."""

    def peak_memory_bytes(self) -> int:
        """Largest memory this process has held."""

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock reads the truth."""

    def prepare_process(self) -> None:
        """Settings of the process that make training fast on this chip."""


def detect_backend() -> Backend:
    """The backend of the chip at hand."""
    from anychip.chips.cpu import CpuBackend

    return CpuBackend()


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best rate of a square matrix product in FLOP/s on this device: a measured ceiling, not a vendor's figure."""
    import time

    import torch

    size = 1536
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
