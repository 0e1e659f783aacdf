"""Moore Threads through torch_musa. Sources: torch_musa's repository (January 2026), public readers of mthreads-gmi.
Nothing here has run on the vendor's device."""

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
from anychip.chips.readings import at, json_value, number


def parse_mthreads_gmi(text: str) -> list[DeviceHealth]:
    """`mthreads-gmi -q --json`: a list called GPU, in some versions a mapping called Attached GPUs."""
    value = json_value(text)
    listed = at(value, "GPU")
    mapped = at(value, "Attached GPUs")
    entries = listed if isinstance(listed, list) else list(mapped.values()) if isinstance(mapped, dict) else []
    return [_device(index, entry) for index, entry in enumerate(entries) if isinstance(entry, dict)]


def _device(index: int, entry: dict[str, object]) -> DeviceHealth:
    memory = at(entry, "FB Memory Usage") or at(entry, "Memory Usage")
    power = at(entry, "Power Readings")
    uncorrected = {k: number(v) for k, v in _ecc(at(entry, "ECC Errors") or at(entry, "Ecc Errors"))}
    problems = tuple(f"ECC errors, {key}: {value:.0f}" for key, value in uncorrected.items() if value)
    return DeviceHealth(
        device=str(entry.get("Index", entry.get("Minor Number", index))),
        name=str(entry.get("Product Name", "")),
        healthy=not problems if uncorrected else None,
        problems=problems,
        temperature_c=number(at(entry, "Temperature", "GPU Current Temp")),
        power_watts=number(at(power, "Power Draw ") or at(power, "Power Draw")),
        memory_used_mib=number(at(memory, "Used")),
        memory_total_mib=number(at(memory, "Total")),
    )


def _ecc(value: object) -> list[tuple[str, object]]:
    """Counts of errors that were not corrected, however deep they stand."""
    found: list[tuple[str, object]] = []
    waiting: list[tuple[str, object]] = [("", value)]
    while waiting:
        name, here = waiting.pop()
        if isinstance(here, dict):
            waiting += [(str(key), below) for key, below in here.items()]
        elif ("uncorrect" in name.lower() or "double" in name.lower()) and number(here) is not None:
            found.append((name, here))
    return found


FACTS = VendorFacts(
    vendor="mthreads",
    maker="Moore Threads",
    device_type="musa",
    collectives=Collectives(
        "mccl",
        library="MCCL",
        refused_ops=frozenset({"PREMUL_SUM", "BAND", "BOR", "BXOR"}),
        notes="AVG not for bool. As of January 2026.",
    ),
    plug_in=PlugIn("torch_musa", "torch-musa", autoload=True, where="the vendor's wheels, with its patched torch"),
    visible_devices="MUSA_VISIBLE_DEVICES",
    scheduling=Scheduling((DeviceName("", "mthreads.com/gpu"),), interface_variables=("MCCL_SOCKET_IFNAME",)),
    device_name=r"\bMTT\b|moore threads",
    tools=("mthreads-gmi",),
    settings=(
        Setting("TORCH_MCCL_ASYNC_ERROR_HANDLING", "1", "A failed collective ends the process instead of hanging it."),
        Setting("TORCH_MCCL_TRACE_BUFFER_SIZE", "2000", "Keeps the last collectives for the report after a hang."),
        Setting("TORCH_MCCL_DUMP_ON_TIMEOUT", "1", "Writes that report."),
        Setting("MUSA_LAUNCH_BLOCKING", "1", "The trace shows the operator that failed; slow.", "debug"),
        Setting("TORCH_MUSA_FSDP2_OVERLAP_LEVEL", "1", "By default sharded training does not overlap communication "
                "with computation. Levels above 0 were not tried.", "tune"),
    ),
    health=HealthCommand(
        ("mthreads-gmi", "-q", "--json"), parse_mthreads_gmi, version=r'"Driver Version"\s*:\s*"([^"]+)"'
    ),
    errors=(
        ErrorMeaning("MUSA_ERROR_ECC_UNCORRECTABLE|uncorrectable ECC error", "memory of the device is damaged", True,
                     OUT_OF_SERVICE),
        ErrorMeaning("MUSA_ERROR_HARDWARE_STACK_ERROR", "the device's hardware reports a fault", True,
                     OUT_OF_SERVICE),
        ErrorMeaning("MUSA_ERROR_MTLINK_UNCORRECTABLE", "a link inside the node is broken", True,
                     OUT_OF_SERVICE),
        ErrorMeaning("MUSA_ERROR_ILLEGAL_ADDRESS|illegal memory access", "a kernel left its memory", False,
                     "Repeat with MUSA_LAUNCH_BLOCKING=1 to find the operator."),
        ErrorMeaning("libmusart.so|libmudnn.so", "the vendor's libraries are not found", False,
                     "Set MUSA_HOME and its lib in LD_LIBRARY_PATH."),
    ),
)  # fmt: skip


class MooreThreadsBackend(AcceleratorBackend):
    facts = FACTS
