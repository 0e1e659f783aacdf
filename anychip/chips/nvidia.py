"""NVIDIA, by PyTorch itself. Sources: PyTorch's and nvidia-smi's documentation."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, Setting, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import csv_rows, number

_COLUMNS = (
    "index", "name", "temperature.gpu", "power.draw", "memory.used", "memory.total",
    "ecc.errors.uncorrected.volatile.total", "driver_version",
)  # fmt: skip


def parse_nvidia_smi(text: str) -> list[DeviceHealth]:
    """`nvidia-smi --query-gpu=... --format=csv,noheader,nounits`, one row a device; [N/A] where there is no ECC."""
    found = []
    for row in csv_rows(text, _COLUMNS):
        errors = number(row["ecc.errors.uncorrected.volatile.total"])
        found.append(
            DeviceHealth(
                device=row["index"],
                name=row["name"],
                healthy=None if errors is None else errors == 0,
                problems=(f"{errors:.0f} uncorrected ECC errors",) if errors else (),
                temperature_c=number(row["temperature.gpu"]),
                power_watts=number(row["power.draw"]),
                memory_used_mib=number(row["memory.used"]),
                memory_total_mib=number(row["memory.total"]),
            )
        )
    return found


FACTS = VendorFacts(
    vendor="nvidia",
    maker="NVIDIA",
    device_type="cuda",
    collectives=nccl_like("NCCL"),
    visible_devices="CUDA_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "nvidia.com/gpu"),), interface_variables=("NCCL_SOCKET_IFNAME",)),
    device_name=r"nvidia|geforce|tesla|quadro",
    tools=("nvidia-smi",),
    settings=(
        *WATCHDOG,
        Setting("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "Less fragmentation when tensor sizes vary."),
        Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "Without it cuBLAS may add in another order.", "deterministic"),
        Setting("CUDA_LAUNCH_BLOCKING", "1", "The trace shows the operator that failed; slow.", "debug"),
    ),
    health=HealthCommand(
        ("nvidia-smi", f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader,nounits"),
        parse_nvidia_smi,
        version=r",\s*([\d.]+)\s*$",
    ),
    errors=ERRORS,
)


class NvidiaBackend(AcceleratorBackend):
    facts = FACTS
