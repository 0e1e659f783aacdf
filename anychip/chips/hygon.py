"""Hygon DCU through DTK's build of torch, a relative of ROCm's. Sources: public samples of hy-smi's output. Nothing
here has run on the vendor's device."""

from __future__ import annotations

import re

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import number

_CARD = re.compile(r'"card(\d+)"\s*:\s*\{([^{}]*)\}')
_ENTRY = re.compile(r'"([^"]*)"\s*:\s*(?:"([^"]*)"|([^",{}]*))')


def parse_hy_smi(text: str) -> list[DeviceHealth]:
    """`hy-smi --json`, which often is not JSON: commas are missing and numbers carry units. So the pairs of each card
    are read one by one. The tool shows no health."""
    found = []
    for card, body in _CARD.findall(text):
        entries = {key.lower(): (quoted or bare).strip() for key, quoted, bare in _ENTRY.findall(body)}
        found.append(
            DeviceHealth(
                device=card,
                name=entries.get("card series", ""),
                temperature_c=number(entries.get("temperature (sensor junction) (c)", "")),
                power_watts=number(entries.get("average graphics package power (w)", "")),
                memory_used_mib=number(entries.get("vram total used memory (mib)", "")),
                memory_total_mib=number(entries.get("vram total memory (mib)", "")),
            )
        )
    return found


FACTS = VendorFacts(
    vendor="hygon",
    maker="Hygon",
    device_type="cuda",
    collectives=nccl_like("RCCL"),
    visible_devices="HIP_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "hygon.com/dcu"),), interface_variables=("NCCL_SOCKET_IFNAME",)),
    device_name=r"\bdcu\b|hygon|^[KZ]\d{3}|^BW",
    hip=True,
    tools=("hy-smi",),
    settings=WATCHDOG,
    health=HealthCommand(("hy-smi", "-a", "--json"), parse_hy_smi, version=r"driver version\W+(\d[\d.]*)"),
    errors=ERRORS,
)


class HygonBackend(AcceleratorBackend):
    facts = FACTS
