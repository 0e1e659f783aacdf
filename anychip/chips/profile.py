"""What a probe found of the chip at hand, for training to heed: which operators to compute by the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from anychip.errors import InputError
from anychip.files import write_json


@dataclass(frozen=True)
class ChipProfile:
    """`operators` names those that the vendor's version computes wrong, each with what is wrong with it."""

    vendor: str
    device: str
    torch: str
    operators: Mapping[str, str]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def read_profile(path: Path) -> ChipProfile | None:
    """None when there is no such file. Raises InputError for one that is not a profile."""
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        operators = {str(name): str(reason) for name, reason in raw["operators"].items()}
        return ChipProfile(str(raw["vendor"]), str(raw["device"]), str(raw["torch"]), operators)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError("is not a chip profile.", where=path, do="Run `anychip probe` again, or remove it.") from error


def choices(path: Path | None, vendor: str, recipe: Mapping[str, str]) -> dict[str, str]:
    """Which version of which operator this run uses: the recipe's word, else the profile's if it is of this vendor."""
    profile = read_profile(path) if path is not None else None
    probed = dict.fromkeys(profile.operators, "reference") if profile and profile.vendor == vendor else {}
    return {**probed, **recipe}
