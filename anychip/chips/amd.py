"""AMD through ROCm's build of torch. Sources: PyTorch's and AMD SMI's documentation. Nothing here has run on the
vendor's device."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import DeviceHealth, DeviceName, HealthCommand, Scheduling, Setting, VendorFacts
from anychip.chips.nvidia_like import ERRORS, WATCHDOG, nccl_like
from anychip.chips.readings import at, json_value, number


def parse_amd_smi(text: str) -> list[DeviceHealth]:
    """`amd-smi metric --json`: a list with one mapping a device, in newer versions below gpu_data. A reading is a
    number or {value, unit}; memory is in MB."""
    value = json_value(text)
    entries = at(value, "gpu_data") if isinstance(value, dict) else value
    return [_device(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _device(entry: dict[str, object]) -> DeviceHealth:
    errors = _reading(entry, "ecc", "total_uncorrectable_count")
    return DeviceHealth(
        device=str(entry.get("gpu", "?")),
        healthy=None if errors is None else errors == 0,
        problems=(f"{errors:.0f} uncorrectable ECC errors",) if errors else (),
        temperature_c=_reading(entry, "temperature", "hotspot"),
        power_watts=_reading(entry, "power", "socket_power"),
        memory_used_mib=_reading(entry, "mem_usage", "used_vram"),
        memory_total_mib=_reading(entry, "mem_usage", "total_vram"),
    )


def _reading(entry: dict[str, object], *keys: str) -> float | None:
    found = at(entry, *keys)
    return number(found["value"] if isinstance(found, dict) and "value" in found else found)


FACTS = VendorFacts(
    vendor="amd",
    maker="AMD",
    device_type="cuda",
    collectives=nccl_like("RCCL"),
    visible_devices="HIP_VISIBLE_DEVICES",
    device_name=r"\bamd\b|radeon|instinct|\bMI\d{3}",
    hip=True,
    scheduling=Scheduling((DeviceName("", "amd.com/gpu"),), interface_variables=("NCCL_SOCKET_IFNAME",)),
    tools=("amd-smi", "rocm-smi"),
    settings=(
        *WATCHDOG,
        Setting(
            "PYTORCH_HIP_ALLOC_CONF", "expandable_segments:True", "Less fragmentation when tensor sizes vary.", "tune"
        ),
        Setting("AMD_SERIALIZE_KERNEL", "3", "The trace shows the operator that failed; slow.", "debug"),
    ),
    health=HealthCommand(("amd-smi", "metric", "--json"), parse_amd_smi),
    errors=ERRORS,
)


class AmdBackend(AcceleratorBackend):
    facts = FACTS
