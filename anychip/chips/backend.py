"""What the rest of the package asks of a chip. One file beside this one per vendor answers."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from anychip.chips.accelerator import MemoryStatistics
from anychip.chips.detect import detect_backend
from anychip.chips.facts import ErrorMeaning, Purpose, Setting, VendorFacts

if TYPE_CHECKING:
    import torch

__all__ = ["Backend", "MemoryStatistics", "detect_backend", "measure_matmul_flops"]


class Backend(Protocol):
    """A chip as the rest of the package sees it."""

    @property
    def facts(self) -> VendorFacts:
        """What is said of the vendor's software: names, variables, limits, error codes."""

    @property
    def vendor(self) -> str: ...

    @property
    def collective_backend(self) -> str: ...

    def load(self) -> None:
        """Import the vendor's plug-in, if there is one."""

    def device_count(self) -> int:
        """Devices that this process sees."""

    def device(self, local_rank: int | None = None) -> torch.device:
        """The device that this process computes on, by its rank within the node; LOCAL_RANK when None."""

    def multiplies_bf16(self) -> bool:
        """Whether bf16 matrix products run in hardware, rather than by conversion to fp32."""

    def memory(self) -> MemoryStatistics:
        """What this process holds on its device."""

    def peak_memory_bytes(self) -> int:
        """Largest memory this process has held."""

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock reads the truth."""

    def prepare_process(self) -> None:
        """Settings of the process that make training fast on this chip."""

    def set_deterministic(self, enabled: bool) -> None:
        """Bitwise repetition on or off. Once, before the first operator."""

    def environment(self, world_size: int, *purposes: Purpose) -> list[Setting]:
        """Variables to set for a job of so many processes, with the reason for each."""

    def collective_timeout(self, world_size: int) -> timedelta:
        """What init_process_group should be given."""

    def explain_error(self, text: str) -> ErrorMeaning | None:
        """What an error's text means on this chip, and whether it says that hardware is broken."""


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
