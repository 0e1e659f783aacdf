"""The emulated accelerator as training sees it."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.cpu import CpuBackend
from anychip.chips.emulated.device import COLLECTIVES, DEVICE_TYPE, load_device
from anychip.chips.emulated.quirks import Quirks
from anychip.chips.facts import Collectives, VendorFacts


class EmulatedBackend(AcceleratorBackend):
    @property
    def facts(self) -> VendorFacts:  # type: ignore[override]  # what it lacks is the user's choice
        quirks = Quirks.from_environment()
        refused_ops = {"AVG": quirks.no_avg, "PREMUL_SUM": quirks.no_premul_sum}
        refused_dtypes = {"float64": quirks.no_fp64, "int64": quirks.no_int64_reduce}
        return VendorFacts(
            vendor="emulated",
            device_type=DEVICE_TYPE,
            collectives=Collectives(
                COLLECTIVES,
                library="Gloo",
                refused_ops=frozenset(op for op, refused in refused_ops.items() if refused),
                refused_dtypes=frozenset(dtype for dtype, refused in refused_dtypes.items() if refused),
            ),
            notes="Lives in host memory and computes with the CPU's kernels; no evidence about any chip.",
        )

    def load(self) -> None:
        load_device()

    def multiplies_bf16(self) -> bool:
        return CpuBackend().multiplies_bf16()

    def prepare_process(self) -> None:
        super().prepare_process()
        CpuBackend().prepare_process()  # its memory is the host's
        if load_device().cpu_watch:
            from anychip.chips.emulated.watch import cpu_watch

            cpu_watch().__enter__()  # until the process ends
