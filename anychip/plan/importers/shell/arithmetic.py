"""Integer arithmetic between `$((` and `))`: + - * / % and parentheses, as shells compute it."""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\s*(?:(\d+)|\$?\{?([A-Za-z_]\w*)\}?|(.))", re.DOTALL)
_LONGEST = 2000
_LARGEST = 2**63
_DEPTH = 50  # of parentheses and signs


def evaluate(text: str, variable: Callable[[str], str]) -> int | None:
    """The value, or None for what is no such expression (or divides by zero); `variable` looks a name up."""
    if len(text) > _LONGEST:
        return None
    tokens: list[str] = []
    for number, name, other in _TOKEN.findall(text.strip()):
        value = number or (variable(name).strip() or "0" if name else other)
        if name and not re.fullmatch(r"[+-]?\d{1,19}", value):
            return None
        tokens += ["(", *value.partition("-")[1:], ")"] if value.startswith("-") and name else [value]
    try:
        parser = _Parser([token for token in tokens if token])
        value_ = parser.sum(0)
        return value_ if parser.at == len(parser.tokens) else None
    except (ValueError, IndexError, ZeroDivisionError):
        return None


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    def sum(self, depth: int) -> int:
        value = self._product(depth)
        while (sign := self._take("+", "-")) is not None:
            other = self._product(depth)
            value = _checked(value + other if sign == "+" else value - other)
        return value

    def _product(self, depth: int) -> int:
        value = self._single(depth)
        while (sign := self._take("*", "/", "%")) is not None:
            other = self._single(depth)
            if sign == "*":
                value = _checked(value * other)
                continue
            quotient = abs(value) // abs(other) * (1 if (value < 0) == (other < 0) else -1)  # shells cut towards zero
            value = quotient if sign == "/" else value - quotient * other
        return value

    def _single(self, depth: int) -> int:
        if depth > _DEPTH:
            raise ValueError
        if (sign := self._take("+", "-")) is not None:
            value = self._single(depth + 1)
            return value if sign == "+" else -value
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise ValueError
            return value
        token = self.tokens[self.at]
        self.at += 1
        return _checked(int(token))

    def _take(self, *wanted: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None


def _checked(value: int) -> int:
    if abs(value) >= _LARGEST:
        raise ValueError
    return value
