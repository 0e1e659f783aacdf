"""What the emulated chip lacks, as a vendor's chip would: settings that a test turns on."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

from anychip.errors import InputError

VARIABLE = "ANYCHIP_EMULATED"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Quirks:
    """One chip's habits. Without any it does all that the CPU and gloo do, and AVG and PREMUL_SUM besides.

    devices            how many a process sees (1 to 64)
    memory             bytes of each device; 0: as much as the host has. Beyond: torch.OutOfMemoryError
    slow_links         bytes a second of this process's link, each direction; 0: as fast as gloo. Transfers take as long
                       as a ring would, beside computation
    no_avg             collectives refuse ReduceOp.AVG
    no_premul_sum      collectives refuse ReduceOp.PREMUL_SUM
    no_int64_reduce    collectives refuse to reduce int64
    no_fp64            no float64 tensor can be made, and none reduced
    cpu_watch          training fails when a product or attention runs on the CPU
    """

    devices: int = 8
    memory: int = 0
    slow_links: int = 0
    no_avg: bool = False
    no_premul_sum: bool = False
    no_int64_reduce: bool = False
    no_fp64: bool = False
    cpu_watch: bool = False

    @classmethod
    def from_environment(cls) -> Quirks:
        return cls.parse(os.environ.get(VARIABLE, ""))

    @classmethod
    def parse(cls, text: str) -> Quirks:
        """Read `no_avg,memory=2GB,slow_links=1GB/s`; `worst` is all of WORST, and what follows it counts.

        Raises InputError for a name or value that is not known.
        """
        quirks = cls()
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, has_value, value = item.partition("=")
            if item == "worst":
                quirks = WORST
            elif name in _sizes() and has_value:
                quirks = _with(quirks, name, _number(name, value))
            elif name in _switches() and not has_value:
                quirks = _with(quirks, name, True)
            else:
                known = ", ".join(["worst", *sorted(_switches()), *(f"{size}=" for size in sorted(_sizes()))])
                raise InputError(f"does not know {item!r}.", where=VARIABLE, do=f"It takes, by commas: {known}.")
        if not 1 <= quirks.devices <= 64:
            raise InputError(f"devices is {quirks.devices}.", where=VARIABLE, do="Give 1 to 64.")
        return quirks


WORST = Quirks(
    memory=2 * 10**9,
    slow_links=10**9,
    no_avg=True,
    no_premul_sum=True,
    no_int64_reduce=True,
    no_fp64=True,
    cpu_watch=True,
)


def _with(quirks: Quirks, name: str, value: Any) -> Quirks:
    return replace(quirks, **{name: value})


def _switches() -> set[str]:
    return {field.name for field in fields(Quirks) if isinstance(field.default, bool)}


def _sizes() -> set[str]:
    return {field.name for field in fields(Quirks)} - _switches()


def _number(name: str, text: str) -> int:
    """`8`, `2GB`, `1.5GiB`, `1GB/s`"""
    amount = text.removesuffix("/s") if name == "slow_links" else text
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if amount.endswith(unit)), "")
    try:
        number = float(amount.removesuffix(unit)) * _UNITS.get(unit, 1)
        if number < 0 or (name == "devices" and unit):
            raise ValueError
        return int(number)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{name}={text} is not a number.", where=VARIABLE, do="Write for example devices=2, memory=2GB or 1GB/s."
        ) from error
