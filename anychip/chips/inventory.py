"""What can be said of the chip that a process computes on: vendor, model, serial number, driver, firmware.

All of it is what drivers and tools say. nvidia-smi was read on an H100 (driver 580), the other tools' words are from
memory; what cannot be read stays None.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.chips.cpu import cpu_model
from anychip.chips.makers import drivers_among, maker_of, maker_of_processor

if TYPE_CHECKING:
    import torch

    from anychip.chips.backend import Backend

_SECONDS = 30
_FIELDS = ("serial", "driver", "firmware")
# Command ({index}: the device) and, for each field, a regular expression whose group 1 is its value.
_TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "ascend": (
        "npu-smi info -t board -i {index}",
        {
            "serial": r"Serial Number\s*:\s*(\S+)",
            "driver": r"Software Version\s*:\s*(\S+)",
            "firmware": r"Firmware Version\s*:\s*(\S+)",
        },
    ),
    "cambricon": (
        "cnmon info -c {index}",
        {"serial": r"SN\s*:\s*(\S+)", "driver": r"Driver\s*:\s*(\S+)", "firmware": r"Firmware\s*:\s*(\S+)"},
    ),
    "mthreads": (
        "mthreads-gmi -q -i {index}",
        {
            "serial": r"Serial Number\s*:\s*(\S+)",
            "driver": r"Driver Version\s*:\s*(\S+)",
            "firmware": r"(?:VBIOS|Firmware) Version\s*:\s*(\S+)",
        },
    ),
    "nvidia": (
        "nvidia-smi -q -i {index}",
        {
            "serial": r"(?:Serial Number\s*:\s*(?!N/A)|GPU UUID\s*:\s*)(\S+)",
            "driver": r"Driver Version\s*:\s*(\S+)",
            "firmware": r"VBIOS Version\s*:\s*(\S+)",
        },
    ),
}


def inventory(backend: Backend, device: torch.device, local_rank: int) -> dict[str, Any]:
    """The chip of this process, its host, and whose accelerators the software here could drive, as JSON:
    {vendor, maker, country, model, serial, driver, firmware, host, software: [{vendor, maker, country, what}]}."""
    maker = maker_of(backend.vendor, backend.facts.maker)
    told: dict[str, str | None]
    if backend.vendor == "cpu":
        processor = _processor()
        maker = maker_of_processor(processor.get("vendor_id") or processor.get("CPU implementer", ""))
        told = {"serial": None, "driver": f"Linux {platform.release()}", "firmware": processor.get("microcode")}
        model = cpu_model()
    else:
        told, model = _ask_tool(backend, local_rank), _model(device)
    software = drivers_among(mapped_libraries(), _installed())
    return {
        **maker.as_json(),
        "model": model,
        **told,
        "host": platform.node(),
        "software": [{**maker_of(vendor).as_json(), "what": what} for vendor, what in software.items()],
    }


def mapped_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the shared libraries that this process has loaded; none where the system does not say."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line[line.index("/") :] for line in lines if "/" in line}
    return sorted(path for path in paths if re.search(r"\.so(\.[\d.]+)?( \(deleted\))?$", path))


def read_tool(text: str, vendor: str) -> dict[str, str | None]:
    """Serial number, driver and firmware in what a vendor's tool printed."""
    found = {name: re.search(pattern, text, re.IGNORECASE) for name, pattern in _TOOLS[vendor][1].items()}
    return {name: match.group(1) if (match := found[name]) else None for name in _FIELDS}


def _ask_tool(backend: Backend, local_rank: int) -> dict[str, str | None]:
    if backend.vendor not in _TOOLS:
        return dict.fromkeys(_FIELDS)
    command = _TOOLS[backend.vendor][0].format(index=_index_on_host(backend, local_rank)).split()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(_FIELDS)
    return read_tool(done.stdout, backend.vendor)


def _index_on_host(backend: Backend, local_rank: int) -> str:
    """What the tool calls this process's device: the process may see only some."""
    visible = os.environ.get(backend.facts.visible_devices or "", "").split(",")
    return visible[local_rank].strip() if any(visible) and local_rank < len(visible) else str(local_rank)


def _model(device: torch.device) -> str:
    import torch

    try:
        return str(torch.get_device_module(device).get_device_properties(device).name)
    except (AttributeError, RuntimeError):
        return device.type


def _processor() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.removeprefix(" ") for key, _, value in pairs if key.strip()}


def _installed() -> Iterator[str]:
    for distribution in distributions():
        yield f"{(distribution.metadata['Name'] or '').lower()}=={distribution.version}"
