"""Enflame GCU through torch_gcu. Sources: DeepSpeed's device table, public readers of efsmi's output; the name of the
collective library is remembered, not read. Nothing here has run on the vendor's device."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import Collectives, DeviceHealth, DeviceName, HealthCommand, PlugIn, Scheduling, VendorFacts
from anychip.chips.readings import number, sections


def parse_efsmi(text: str) -> list[DeviceHealth]:
    """`efsmi -q`: "key : value" lines below each "DEV ID n". The tool's health, where it prints one, is a line whose
    key ends in health."""
    found = []
    for device, lines in sections(text, r"dev id\s*(\d+)"):
        status = next((value for key, value in lines.items() if "/" not in key and key.endswith("health")), None)
        healthy = None if status is None else status.lower() in ("true", "ok", "healthy", "good", "normal")
        found.append(
            DeviceHealth(
                device=device,
                name=lines.get("dev name", ""),
                healthy=healthy,
                problems=(f"health is {status}",) if healthy is False else (),
                temperature_c=number(lines.get("gcu temp", "")),
                power_watts=number(lines.get("cur power", "")),
                memory_used_mib=number(lines.get("mem usage", lines.get("used size", ""))),
                memory_total_mib=number(lines.get("mem size", lines.get("total size", ""))),
            )
        )
    return found


FACTS = VendorFacts(
    vendor="enflame",
    maker="Enflame",
    device_type="gcu",
    collectives=Collectives(
        "eccl",
        library="ECCL",
        refused_ops=frozenset({"PREMUL_SUM", "BAND", "BOR", "BXOR"}),
        notes="Limits are not known: those refused here are assumed.",
    ),
    plug_in=PlugIn("torch_gcu", "torch-gcu", autoload=False, where="the vendor's wheels"),
    visible_devices="TOPS_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "enflame.com/gcu"),), interface_variables=("ECCL_SOCKET_IFNAME",)),
    device_name=r"enflame|\bgcu\b|cloudblazer|^[STi]\d{2,3}\b",
    tools=("efsmi",),
    health=HealthCommand(("efsmi", "-q"), parse_efsmi, version=r"\bVer\s*:\s*(\S+)"),
)


class EnflameBackend(AcceleratorBackend):
    facts = FACTS
