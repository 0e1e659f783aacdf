"""The CPU: the oracle that every chip is compared with, and a laptop's only chip."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anychip.chips.accelerator import AcceleratorBackend, MemoryStatistics
from anychip.chips.facts import Collectives, VendorFacts

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

FACTS = VendorFacts(
    vendor="cpu",
    device_type="cpu",
    collectives=Collectives(
        "gloo",
        library="Gloo",
        refused_ops=frozenset({"PREMUL_SUM"}),
        refused_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2"}),
        notes="AVG is not for integers, bitwise operations are not for floats.",
    ),
)


def cpu_model() -> str:
    """The processor's name as the operating system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class CpuBackend(AcceleratorBackend):
    facts = FACTS

    def device_count(self) -> int:
        return 1

    def device(self, local_rank: int | None = None) -> torch.device:
        """All processes of a node share the CPU."""
        import torch

        return torch.device("cpu")

    def multiplies_bf16(self) -> bool:
        import torch

        if not hasattr(torch.cpu, "get_capabilities"):
            return False
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))

    def memory(self) -> MemoryStatistics:
        """The operating system's view; PyTorch does not count what it allocates here."""
        return MemoryStatistics(None, None, None, self.peak_memory_bytes())

    def peak_memory_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def prepare_process(self) -> None:
        """Keep freed memory. A step frees and takes the same large tensors; giving them back to the system each time
        means a page fault for every 4 KiB at the next step."""
        if not sys.platform.startswith("linux"):
            return
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
