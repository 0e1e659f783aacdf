"""Conditions of `if` and patterns of `case`, as far as a script decides them itself."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from anychip.plan.importers.shell.expand import Missing, Variables

_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le,
    "-gt": operator.gt, "-ge": operator.ge,
}  # fmt: skip
_LONGEST = 200


def holds(words: Sequence[str], variables: Variables) -> bool | None:
    """Whether `[ ... ]`, `[[ ... ]]` or `test ...` holds; None for what only a run could tell. `words` are raw."""
    words = list(words)
    if words[:1] == ["!"]:
        inner = holds(words[1:], variables)
        return None if inner is None else not inner
    ends = {"[": "]", "[[": "]]"}.get(words[0] if words else "")
    if ends and words[-1] == ends:
        return _test(words[1:-1], variables, ends == "]]")
    if words[:1] == ["test"]:
        return _test(words[1:], variables, False)
    return {"true": True, "false": False}.get(words[0]) if len(words) == 1 else None


def matches(pattern: str, text: str) -> bool:
    """A pattern of `case`."""
    return len(pattern) <= _LONGEST and len(text) <= _LONGEST and fnmatchcase(text, pattern)


def value_of(raw: str, variables: Variables) -> str | None:
    """A word's text; None when a command would have to be run for it."""
    text = variables.scalar(raw)
    if isinstance(text, Missing):
        return None if text.startswith(("$(", "`")) else ""
    return text


def _test(words: list[str], variables: Variables, double: bool) -> bool | None:
    if words[:1] == ["!"]:
        inner = _test(words[1:], variables, double)
        return None if inner is None else not inner
    if len(words) == 2 and words[0] in ("-z", "-n"):
        text = value_of(words[1], variables)
        return None if text is None else (text == "") == (words[0] == "-z")
    if len(words) == 1:
        text = value_of(words[0], variables)
        return None if text is None else text != ""
    if len(words) != 3:
        return None
    left, right = value_of(words[0], variables), value_of(words[2], variables)
    if left is None or right is None:
        return None
    if words[1] in ("=", "==", "!="):
        quoted = words[2][:1] in "'\""
        same = matches(right, left) if double and not quoted else left == right
        return same == (words[1] != "!=")
    if words[1] in _NUMBERS and _whole(left) and _whole(right):
        return _NUMBERS[words[1]](int(left), int(right))
    return None


def _whole(text: str) -> bool:
    return len(text) <= 18 and text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
