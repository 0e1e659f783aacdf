"""Which operators a chip computes with: its vendor's own where there are any, unless its profile says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from anychip.chips.operators import ascend, cambricon, cpu, cuda_like, plain
from anychip.chips.operators.contract import Operators
from anychip.chips.operators.override import CheckedOperator, Override
from anychip.chips.operators.plain import reference
from anychip.errors import InputError

OVERRIDES: Mapping[str, Mapping[str, Override]] = {
    "ascend": ascend.OVERRIDES,
    "cambricon": cambricon.OVERRIDES,
    "cpu": cpu.OVERRIDES,
    **dict.fromkeys(("amd", "hygon", "iluvatar", "metax", "nvidia"), cuda_like.OVERRIDES),
    "mthreads": cuda_like.PORTABLE,
}
OPERATORS = tuple(field.name for field in fields(Operators))
CHOICES = ("vendor", "reference")


def operators_for(
    vendor: str, profile: Mapping[str, str] | None = None, overrides: Mapping[str, Override] | None = None
) -> Operators:
    """The operators of a vendor's chip; the reference for a vendor we know no kernels of.

    profile: operator name -> "vendor" (the default) or "reference". overrides: a third party's own, in place of ours.
    Nothing is imported and nothing is tried before an operator's first call. Raises InputError for a profile that
    names no operator or no choice.
    """
    profile = profile or {}
    for name, choice in profile.items():
        if name not in OPERATORS or choice not in CHOICES:
            raise InputError(
                f"{name}: {choice} is not a choice of operator.",
                do=f"Name one of {', '.join(OPERATORS)} and give it one of {', '.join(CHOICES)}.",
            )
    known = overrides_of(vendor) if overrides is None else overrides
    chosen = {
        name: CheckedOperator(name, override, getattr(plain, name))
        for name, override in known.items()
        if profile.get(name, "vendor") == "vendor"
    }
    return replace(reference, **chosen)


def overrides_of(vendor: str) -> Mapping[str, Override]:
    """A vendor's own operators. The emulated chip has some only to have them wrong, when told to."""
    if vendor != "emulated":
        return OVERRIDES.get(vendor, {})
    from anychip.chips.emulated.faults.operators import faulty_overrides

    return faulty_overrides()
