"""What stacks share that PyTorch drives as it drives NVIDIA's: the device is called cuda, the collectives nccl."""

from __future__ import annotations

from anychip.chips.facts import FIRST_RANK, OUT_OF_SERVICE, Collectives, ErrorMeaning, Setting


def nccl_like(library: str, notes: str = "") -> Collectives:
    """NCCL's interface. Bitwise operations are not in it; PREMUL_SUM is, for floating point."""
    return Collectives(
        "nccl",
        library=library,
        refused_ops=frozenset({"BAND", "BOR", "BXOR"}),
        altered_dtypes={"bool": "uint8"},
        notes=notes,
    )


WATCHDOG = (
    Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "A failed collective ends the process instead of hanging it."),
    Setting("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "Keeps the last collectives for the report after a hang."),
    Setting("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "Writes that report."),
)

ERRORS = (
    ErrorMeaning("uncorrectable ECC error", "memory of the device is damaged", True, OUT_OF_SERVICE),
    ErrorMeaning("hardware stack error", "the device's hardware reports a fault", True, OUT_OF_SERVICE),
    ErrorMeaning("(GPU|device) (has )?fallen off the bus|no longer (accessible|responding)", "the device is lost", True,
                 OUT_OF_SERVICE),
    ErrorMeaning("uncorrectable.*(nvlink|xgmi)|(nvlink|xgmi).*uncorrectable", "a link inside the node is broken", True,
                 OUT_OF_SERVICE),
    ErrorMeaning("illegal memory access", "a kernel left its memory", False,
                 "Repeat with CUDA_LAUNCH_BLOCKING=1 to find the operator."),
    ErrorMeaning("device-side assert", "a kernel's own check failed, most often an index out of range", False,
                 "Repeat with CUDA_LAUNCH_BLOCKING=1 to find the operator."),
    ErrorMeaning("Watchdog caught collective operation timeout", "a collective did not end in time", False,
                 FIRST_RANK),
    ErrorMeaning("unhandled (system|cuda) error", "the collective library could not use the network or a device", False,
                 "Repeat with NCCL_DEBUG=INFO and read its first warning."),
)  # fmt: skip
