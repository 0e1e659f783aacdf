"""Which chip of the catalogue a table means: runs.csv's names, the catalogue's own ids, and plain spellings of them."""

from __future__ import annotations

import re

from anychip.chips.catalog import Chip, load_catalog
from anychip.plan.rows.run import Incomplete

_NAMES = {
    "a100-80g-sxm": "a100-80g",
    "a100-40g-sxm": "a100-40g",
    "a100-40g": "a100-40g",
    "a100-80g-pcie": "a100-80g-pcie",
    "v100-32g-sxm": "v100-32g",
    "h100-80g-sxm": "h100-sxm",
    "h800-sxm": "h800-sxm",
    "b200-sxm": "b200-sxm",
    "b300-sxm": "b300-sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "tpuv4": "tpu-v4",
    "tpuv5e": "tpu-v5e",
    "tpuv5p": "tpu-v5p",
    "tpuv6e-trillium": "tpu-v6e",
    "tpuv6e": "tpu-v6e",
    "ascend-910a": "ascend-910a",
    "ascend-910b": "ascend-910b3",
    "910b": "ascend-910b3",
    "ascend-unspecified": "ascend-910b3",
    "ascend-910c": "ascend-910c-die",
    "910c": "ascend-910c-die",
}
_SAY_NOTHING = frozenset(("oam", "nvidia", "amd", "huawei", "cambricon", "intel", "google", "ascend"))
_MEMORY = re.compile(r"(\d+)gi?b?")
_SOCKET = re.compile(r"(sxm|hbm)\d?e?")
_MEMORY_TOLERANCE = 0.08  # 64 GiB printed of 68.7e9 bytes


def catalogue_chip(printed: str, notes: str = "") -> tuple[str, bool]:
    """The id of the chip that a row prints, and whether the name is one of those that leave no doubt.

    Raises Incomplete when it is none of the catalogue's, or when it could be several of them.
    """
    name = re.sub(r"[\s_]+", "-", printed.strip().lower())
    catalog = load_catalog()
    # Sources name the server and not the bin; the same jobs run 12 to 20 % faster in one than in the other.
    if name == "ascend-910b" and re.search("900 A2 POD", notes, re.IGNORECASE):
        return "ascend-910b2", True
    if identifier := _NAMES.get(name, name if name in catalog else None):
        return identifier, True
    found = _spelled(name, catalog)
    if not found:
        raise Incomplete(f"chip {printed!r} is not in the catalogue" if printed else "the chip is not named")
    if len(found) > 1:
        raise Incomplete(f"chip {printed!r} may be {' or '.join(found)}")
    return found[0], False


def _spelled(name: str, catalog: dict[str, Chip]) -> list[str]:
    """Ids that a spelling can mean, which adds a maker, a socket or the right memory, or leaves out an id's end."""
    words = name.split("-")
    gigabytes = next((float(size.group(1)) for word in words if (size := _MEMORY.fullmatch(word))), None)
    short = _telling(words)
    socketed = any(word.startswith("sxm") for word in words)
    if known := _NAMES.get("-".join(short)):
        found = [catalog[known]]
    else:
        found = [
            chip
            for chip in catalog.values()
            if short and _telling(chip.id.split("-"))[: len(short)] == short and not (socketed and "pcie" in chip.id)
        ]
    return [chip.id for chip in found if gigabytes is None or _holds(chip, gigabytes)]


def _telling(words: list[str]) -> list[str]:
    return [w for w in words if w and w not in _SAY_NOTHING and not _MEMORY.fullmatch(w) and not _SOCKET.fullmatch(w)]


def _holds(chip: Chip, gigabytes: float) -> bool:
    return chip.memory_gb is not None and abs(chip.memory_gb.value / gigabytes - 1) < _MEMORY_TOLERANCE
