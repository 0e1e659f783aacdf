"""Iluvatar CoreX through its own build of torch. Sources: public uses of ixsmi, which takes nvidia-smi's query options.
Nothing here has run on the vendor's device."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import csv_rows, number

_COLUMNS = ("index", "name", "temperature.gpu", "memory.used", "memory.total", "driver_version")


def parse_ixsmi(text: str) -> list[DeviceHealth]:
    """`ixsmi --query-gpu=... --format=csv,noheader`, one row a device, numbers with units. Power is left out, because
    the field's name changed between versions; the tool shows no health."""
    return [
        DeviceHealth(
            device=row["index"],
            name=row["name"],
            temperature_c=number(row["temperature.gpu"]),
            memory_used_mib=number(row["memory.used"]),
            memory_total_mib=number(row["memory.total"]),
        )
        for row in csv_rows(text, _COLUMNS)
    ]


FACTS = VendorFacts(
    vendor="iluvatar",
    maker="Iluvatar CoreX",
    device_type="cuda",
    collectives=nccl_like("IxCCL"),
    visible_devices="CUDA_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "iluvatar.com/gpu"),), interface_variables=("NCCL_SOCKET_IFNAME",)),
    device_name=r"iluvatar|\bBI-?V\d|\bMR-?V\d",
    tools=("ixsmi",),
    settings=WATCHDOG,
    health=HealthCommand(
        ("ixsmi", f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader"),
        parse_ixsmi,
        version=r",\s*([\d.]+)\s*$",
    ),
    errors=ERRORS,
)


class IluvatarBackend(AcceleratorBackend):
    facts = FACTS
