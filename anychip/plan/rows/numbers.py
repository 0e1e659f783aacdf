"""Numbers as tables print them, read only where one reading is possible."""

from __future__ import annotations

import math
import re

_NOT_PRINTED = frozenset(("", "-", "--", "\u2013", "\u2014", "n/a", "na", "nan", "none", "null", "nil", "?", "unknown"))
_SEPARATORS = ",_'\u2019 \u00a0\u202f"
_GROUPED = re.compile(rf"\d{{1,3}}(?:([{_SEPARATORS}])\d{{3}})(?:\1\d{{3}})*(\.\d+)?")
LARGEST = 1e15  # of any count or rate in such a table


def number_of(text: str, *, whole: bool, zero: bool = False) -> float | None:
    """The number that a cell prints; None where it says that there is none.

    Thousands may be set apart (`4,096`, `4_096`). Raises ValueError, the message a reason, for what is no number, is
    not finite, not whole where `whole`, below or (unless `zero`) at 0, or could be a decimal comma (`5,751` of a
    quantity that is not `whole`).
    """
    text = text.strip()
    if text.lower() in _NOT_PRINTED:
        return None
    value = _parsed(text, whole)
    if not math.isfinite(value):
        raise ValueError("is not finite")
    if value < 0 or (value == 0 and not zero):
        raise ValueError("is not above 0")
    if value > LARGEST:
        raise ValueError(f"is above {LARGEST:g}")
    if whole and value != round(value):
        raise ValueError("is no whole number")
    return value


def _parsed(text: str, whole: bool) -> float:
    if grouped := _GROUPED.fullmatch(text):
        one_comma = grouped.group(1) == "," and text.count(",") == 1 and not grouped.group(2)
        if one_comma and not whole:
            raise ValueError("is a thousand or a decimal comma: print it without")
        return float(text.replace(grouped.group(1), ""))
    if "_" in text:  # which Python would take anywhere
        raise ValueError("is no number")
    try:
        return float(text)
    except ValueError:
        raise ValueError("is no number") from None
