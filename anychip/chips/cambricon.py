"""Cambricon MLU through torch_mlu. Sources: torch_mlu's repository of 2024, public readers of cnmon's output. Nothing
here has run on the vendor's device."""

from __future__ import annotations

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.facts import (
    OUT_OF_SERVICE,
    Collectives,
    DeviceHealth,
    DeviceName,
    ErrorMeaning,
    HealthCommand,
    PlugIn,
    Scheduling,
    Setting,
    VendorFacts,
)
from anychip.chips.readings import number, sections


def parse_cnmon(text: str) -> list[DeviceHealth]:
    """`cnmon info`: a block of "key : value" lines below each "Card N". Health is what its uncorrectable-error and
    status lines say, where the version prints them."""
    return [_card(name, lines) for name, lines in sections(text, r"card\s*:?\s*(\d+)")]


def _card(name: str, lines: dict[str, str]) -> DeviceHealth:
    problems = [
        f"{key}: {value}"
        for key, value in lines.items()
        if "/" not in key and "uncorrect" in key and (number(value) or 0) > 0
    ]
    status = next((value for key, value in lines.items() if key in ("health", "health status", "mlu health")), None)
    if status is not None and status.lower() not in ("good", "ok", "healthy", "normal"):
        problems.append(f"health is {status}")
    said = status is not None or any("uncorrect" in key for key in lines)
    return DeviceHealth(
        device=name,
        name=lines.get("product name", lines.get("product", "")),
        healthy=not problems if said else None,
        problems=tuple(problems),
        temperature_c=number(lines.get("temperature/chip", lines.get("chip", ""))),
        power_watts=number(lines.get("power/usage", "")),
        memory_used_mib=number(lines.get("physical memory usage/used", lines.get("used", ""))),
        memory_total_mib=number(lines.get("physical memory usage/total", lines.get("total", ""))),
    )


FACTS = VendorFacts(
    vendor="cambricon",
    maker="Cambricon",
    device_type="mlu",
    collectives=Collectives(
        "cncl",
        library="CNCL",
        refused_ops=frozenset({"AVG", "PREMUL_SUM", "BAND", "BOR", "BXOR"}),
        refused_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2"}),
        altered_dtypes={"float64": "sent as float32", "bool": "sent as uint8"},
        notes="As of 2024.",
    ),
    plug_in=PlugIn("torch_mlu", "torch-mlu", autoload=False, where="the vendor's wheels, with its patched torch"),
    visible_devices="MLU_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "cambricon.com/mlu"),)),
    device_name=r"\bmlu",
    tools=("cnmon",),
    settings=(
        Setting("CNCL_ASYNC_ERROR_HANDLING", "1", "A failed collective ends the process instead of hanging it."),
        Setting("ENABLE_FALLBACK_TO_CPU", "0", "An operator without a kernel fails instead of running on the CPU. The "
                "name was read in the plug-in, the value's effect is taken from it.", "canary"),
        Setting("CNCL_BLOCKING_WAIT", "1", "A collective that fails raises where it was called; slow.", "debug"),
        Setting("CNCL_DESYNC_DEBUG", "1", "Says which ranks entered which collective.", "debug"),
    ),
    health=HealthCommand(("cnmon", "info"), parse_cnmon, version=r"(?:driver(?: version)?\s*:|cnmon)\s*v?(\d\S*)"),
    errors=(
        ErrorMeaning("uncorrect.*ECC|ECC.*uncorrect", "memory of the device is damaged", True, OUT_OF_SERVICE),
        ErrorMeaning("NEUWARE_HOME|libcnrt.so|libcnnl.so", "the vendor's libraries are not found", False,
                     "Set NEUWARE_HOME and its lib64 in LD_LIBRARY_PATH."),
    ),
    notes="Its plug-in has no autoload: anychip imports it. Its error codes are not known to us. Further variables: "
    "PYTORCH_MLU_ALLOC_CONF, CNCL_P2P_LEVEL, CNCL_SHM_DISABLE, CNCL_MLULINK_DISABLE.",
)  # fmt: skip


class CambriconBackend(AcceleratorBackend):
    facts = FACTS
