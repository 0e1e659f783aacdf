"""Reads the catalogue's files into chips, or says which file, chip and field is wrong.

A file holds one vendor. A chip names `source` and `confidence` once; each of its figures is a plain number that takes
them, or `{value, source, confidence}` with its own.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from anychip.chips.catalog.schema import Chip
from anychip.errors import InputError
from anychip.recipe.load import explain

FOLDER = Path(__file__).parent
_FIGURES = ("memory_gb", "memory_gb_per_s", "intra_node_gb_per_s", "inter_node_gbit_per_s", "tdp_watts")
_FIGURE_TABLES = ("peak_tflops", "measured_tflops")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


def load_catalog(folder: Path = FOLDER) -> dict[str, Chip]:
    """Every chip of the catalogue by id, vendors and chips in the files' order.

    Raises InputError naming the file, the chip and the field that is wrong.
    """
    return dict(_load(folder))


def find_chip(identifier: str) -> Chip:
    """The chip of this id. Raises InputError with the nearest ids when there is none."""
    catalog = load_catalog()
    if identifier in catalog:
        return catalog[identifier]
    close = difflib.get_close_matches(identifier.lower(), catalog, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`anychip chips` lists the chips."
    raise InputError(f"{identifier!r} is not a chip of the catalogue.", do=hint)


def recognize_chip(vendor: str, device_name: str) -> Chip | None:
    """The chip of a vendor that torch calls so, if the catalogue knows it; a card of several sizes may stay unknown."""
    found = [
        chip
        for chip in load_catalog().values()
        if chip.vendor == vendor and chip.torch_name and re.search(chip.torch_name, device_name)
    ]
    return found[0] if len(found) == 1 else None


@cache
def _load(folder: Path) -> dict[str, Chip]:
    chips: dict[str, Chip] = {}
    for path in sorted(folder.glob("*.yaml")):
        for chip in _read_file(path):
            if chip.id in chips:
                raise InputError(f"chip {chip.id} is in the catalogue twice.", where=path, do="Give each its own id.")
            chips[chip.id] = chip
    for chip in chips.values():
        if chip.package is not None and (chip.package not in chips or chips[chip.package].dies is None):
            raise InputError(
                f"chip {chip.id}: package {chip.package} is not a chip with dies.",
                where=folder / f"{chip.vendor}.yaml",
                do="Name the id of a chip that has dies.",
            )
    return chips


def _read_file(path: Path) -> list[Chip]:
    try:
        raw = _LOADER(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"cannot be read as YAML: {error}.", where=path, do="Correct the file.") from None
    shared, chips = _parts(raw, path)
    return [_chip({**shared, **entry}, path) for entry in chips]


def _parts(raw: Any, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What holds for all chips of the file, and the chips."""
    shared = {key: value for key, value in raw.items() if key != "chips"} if isinstance(raw, dict) else {}
    chips = raw.get("chips") if isinstance(raw, dict) else None
    if not isinstance(chips, list) or not all(isinstance(entry, dict) for entry in chips):
        raise InputError(
            "has no list of chips.", where=path, do="Write vendor, maker, torch_device_type and a list called chips."
        )
    return shared, chips


def _chip(entry: dict[str, Any], path: Path) -> Chip:
    given: dict[str, Any] = {key: entry.pop(key) for key in ("source", "confidence") if key in entry}
    for name in _FIGURES:
        if name in entry:
            entry[name] = _figure(entry[name], given)
    for name in _FIGURE_TABLES:
        if isinstance(entry.get(name), dict):
            entry[name] = {dtype: _figure(value, given) for dtype, value in entry[name].items()}
    try:
        return Chip.model_validate(entry)
    except ValidationError as error:
        raise InputError(
            " ".join(explain(error, Chip)), where=f"{path}: chip {entry.get('id', '(without id)')}"
        ) from None


def _figure(value: Any, given: dict[str, Any]) -> Any:
    return {"value": value, **given} if isinstance(value, int | float) and not isinstance(value, bool) else value
