"""MetaX through MACA's build of torch. Sources: public samples and readers of mx-smi's output. Nothing here has run on
the vendor's device."""

from __future__ import annotations

import re

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import cells, number, pair

_NAMED = re.compile(r"(\d+)\s+(MetaX\s*\S+|MX\S+)", re.IGNORECASE)


def parse_mx_smi(text: str) -> list[DeviceHealth]:
    """`mx-smi`: two rows a device. | 0  MetaX C500 | bus | use |, then | 36C  69W / 350W | 858/65536 MiB | |. The tool
    shows no health."""
    found = []
    named: re.Match[str] | None = None
    for line in text.splitlines():
        row = cells(line)
        if len(row) < 2:
            continue
        start = _NAMED.match(row[0])
        if start:
            named = start
        elif named and "MiB" in row[1]:
            used, total = pair(row[1])
            readings = row[0].split()
            found.append(
                DeviceHealth(
                    device=named.group(1),
                    name=named.group(2),
                    temperature_c=number(readings[0].rstrip("Cc")) if readings else None,
                    power_watts=number(readings[1].rstrip("Ww")) if len(readings) > 1 else None,
                    memory_used_mib=used,
                    memory_total_mib=total,
                )
            )
            named = None
    return found


FACTS = VendorFacts(
    vendor="metax",
    maker="MetaX",
    device_type="cuda",
    collectives=nccl_like("MCCL", "The library's own variables begin with MCCL_."),
    visible_devices="CUDA_VISIBLE_DEVICES",
    scheduling=Scheduling(
        (DeviceName("", "metax-tech.com/gpu"),),
        interface_variables=(
            "NCCL_SOCKET_IFNAME",
            "MCCL_SOCKET_IFNAME",
        ),
    ),
    device_name=r"metax|^MXC\d",
    tools=("mx-smi",),
    settings=WATCHDOG,
    health=HealthCommand(("mx-smi",), parse_mx_smi, version=r"Kernel Mode Driver Version:\s*(\S+)"),
    errors=ERRORS,
)


class MetaxBackend(AcceleratorBackend):
    facts = FACTS
