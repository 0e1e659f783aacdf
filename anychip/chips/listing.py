"""`anychip chips`: the catalogue as a table, and what is detected here."""

from __future__ import annotations

from typing import Any

from anychip.chips.catalog import Chip, Figure, load_catalog, recognize_chip
from anychip.chips.probe import probe

_DTYPES = ("bf16", "fp16", "fp8", "int8")
_MARKS = {"official": "", "press": "p", "measured": "m", "derived": "d"}
LEGEND = (
    "Peaks in TFLOP/s (TOP/s for int8), dense; memory in GB and GB/s; link inside a node in GB/s and between nodes in "
    "Gbit/s, a device and direction. p: press, m: measured, d: derived, ~: from memory, not read again; - : unknown."
)
_HEADER = ("chip", "device", "year", *_DTYPES, "GB", "GB/s", "a node", "link", "net", "W")


def detected_chips() -> dict[str, Any]:
    """Vendor, devices, and the catalogue's chip of each where its name is known; or why nothing can be said."""
    seen = probe()
    if "vendor" not in seen:
        return {
            "vendor": None,
            "reason": " ".join(seen.get("refused", {}).values()) or seen.get("failed") or seen.get("error"),
        }
    devices = [{**d, "chip": _chip_id(seen["vendor"], d["name"])} for d in seen.get("devices", [])]
    return {"vendor": seen["vendor"], "devices": devices}


def chips_as_json() -> dict[str, Any]:
    catalog = {chip.id: chip.model_dump(mode="json", exclude_none=True) for chip in load_catalog().values()}
    return {"catalog": catalog, "detected": detected_chips()}


def chips_as_text() -> str:
    rows = [_HEADER, *(_row(chip) for chip in load_catalog().values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(map(_padded, range(len(row)), row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", LEGEND, "", _detected_text(detected_chips())])


def _padded(column: int, cell: str, width: int) -> str:
    """Names to the left, figures to the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _row(chip: Chip) -> tuple[str, ...]:
    peaks = (chip.peak_tflops.get(dtype) for dtype in _DTYPES)  # type: ignore[call-overload]
    return (
        chip.id,
        chip.torch_device_type,
        str(chip.year or "-"),
        *(_cell(peak) for peak in peaks),
        _cell(chip.memory_gb),
        _cell(chip.memory_gb_per_s),
        str(chip.devices_per_node or "-"),
        _cell(chip.intra_node_gb_per_s),
        _cell(chip.inter_node_gbit_per_s),
        _cell(chip.tdp_watts),
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:g}{_MARKS[figure.confidence]}{'~' if figure.from_memory else ''}"


def _chip_id(vendor: str, name: str) -> str | None:
    chip = recognize_chip(vendor, name)
    return chip.id if chip else None


def _detected_text(detected: dict[str, Any]) -> str:
    if detected["vendor"] is None:
        return f"Detected here: nothing, because: {detected['reason']}"
    names = [f"{device['name']} ({device['chip'] or 'not in the catalogue'})" for device in detected["devices"]]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if detected["vendor"] == "cpu":
        return f"Detected here: no accelerator; the CPU, {detected['devices'][0]['name']}."
    return f"Detected here: {detected['vendor']}, {counted}."
