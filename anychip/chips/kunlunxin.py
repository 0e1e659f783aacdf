"""Kunlunxin XPU, which the vendor's XMLIR shows to torch as cuda. Sources: FlagPerf and public readers of `xpu-smi -m`.
Nothing here has run on the vendor's device."""

from __future__ import annotations

import shlex

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import number

_DEVICE, _TEMPERATURE, _POWER, _USED, _TOTAL, _NAME = 1, 4, 8, 17, 18, 21  # columns of `xpu-smi -m`


def parse_xpu_smi(text: str) -> list[DeviceHealth]:
    """`xpu-smi -m`: one row of at least 22 columns a device; memory in MiB. The tool shows no health here."""
    found = []
    for line in text.splitlines():
        try:
            row = shlex.split(line)
        except ValueError:
            continue
        if len(row) > _NAME and row[_DEVICE].isdigit() and row[_TOTAL].isdigit():
            found.append(
                DeviceHealth(
                    device=row[_DEVICE],
                    name=row[_NAME],
                    temperature_c=number(row[_TEMPERATURE]),
                    power_watts=number(row[_POWER]),
                    memory_used_mib=number(row[_USED]),
                    memory_total_mib=number(row[_TOTAL]),
                )
            )
    return found


FACTS = VendorFacts(
    vendor="kunlunxin",
    maker="Kunlunxin",
    device_type="cuda",
    collectives=nccl_like("BKCL or XCCL", "Which library answers to nccl depends on the stack's release."),
    visible_devices="XPU_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "kunlunxin.com/xpu"),), interface_variables=("BKCL_SOCKET_IFNAME",)),
    device_name=r"kunlun|\bxpu\b|^[PR]\d{3}$",
    tools=("xpu-smi", "xpu_smi"),
    absent_tools=("nvidia-smi",),
    marker_variable="XPU",
    settings=WATCHDOG,
    health=HealthCommand(("xpu-smi", "-m"), parse_xpu_smi),
    errors=ERRORS,
)


class KunlunxinBackend(AcceleratorBackend):
    facts = FACTS
