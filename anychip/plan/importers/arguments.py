"""Arguments of Megatron-LM and MindSpeed by name, and which of them nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable

from anychip.errors import InputError
from anychip.plan.importers.found import real_number, whole_number


class Arguments:
    """Values by name, read as numbers. Underscores are hyphens; a later argument replaces an earlier one."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises InputError when no word is an argument."""
        self._values: dict[str, list[str]] = {}
        self._asked: set[str] = set()
        values: list[str] = []
        for word in words:
            if word.startswith("--") and len(word) > 2:
                name, equals, value = word[2:].partition("=")
                values = [value] if equals else []
                self._values[name.replace("_", "-")] = values
            else:
                values.append(word)
        if not self._values:
            raise InputError(
                "holds no --arguments.", do="Give a Megatron or MindSpeed script, or its list of arguments."
            )

    def __contains__(self, name: str) -> bool:
        self._asked.add(name)
        return name in self._values

    def text(self, name: str, default: str = "") -> str:
        """The first value; "true" for a flag alone."""
        return (self.many(name) or ["true"])[0] if name in self else default

    def many(self, name: str) -> list[str]:
        return self._values[name] if name in self else []

    def number(self, *names: str) -> int | None:
        """The first that is given."""
        return next((whole_number(self.text(name), f"--{name}") for name in names if name in self), None)

    def real(self, *names: str) -> float | None:
        return next((real_number(self.text(name), f"--{name}") for name in names if name in self), None)

    def unread(self) -> list[str]:
        """Names that are given and were not asked for."""
        return [name for name in self._values if name not in self._asked]
