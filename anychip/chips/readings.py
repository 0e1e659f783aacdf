"""Pieces for reading the output of vendors' tools. Nothing here raises: what cannot be read is left out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])-?\d{1,12}(?:\.\d{1,6})?")
_PAIR = re.compile(r"(\d{1,12})\s*/\s*(\d{1,12})")


def number(text: object) -> float | None:
    """The first number in a text such as "93.5 W" or "-"."""
    found = _NUMBER.search(str(text))
    return float(found.group()) if found else None


def pair(text: str) -> tuple[float | None, float | None]:
    """The last two numbers that a slash joins, as in "0 / 0   3393 / 65536"."""
    found = _PAIR.findall(text)
    return (float(found[-1][0]), float(found[-1][1])) if found else (None, None)


def cells(line: str) -> list[str]:
    """The cells of a table's row: "| a | b |" is a, b. Empty for anything else."""
    line = line.strip()
    return [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") and line.endswith("|") else []


def csv_rows(text: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV without a header that have as many cells as `columns`."""
    try:
        for row in csv.reader(text.splitlines()):
            if len(row) == len(columns):
                yield {name: cell.strip() for name, cell in zip(columns, row, strict=True)}
    except csv.Error:
        return


def json_value(text: str) -> Any:
    """The JSON value that the text holds, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def at(value: Any, *keys: str) -> Any:
    """The value below nested keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def sections(text: str, header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Blocks of "key : value" lines below lines that match `header`, whose group 1 names the block. Keys are in lower
    case; of a repeated key the first value counts, and `parent/key` is there too when a line without a value (the
    parent) stands above."""
    name: str | None = None
    found: dict[str, str] = {}
    parent = ""
    for line in text.splitlines():
        start = re.match(header, line.strip(), re.IGNORECASE)
        if start:
            if name is not None:
                yield name, found
            name, found, parent = start.group(1), {}, ""
            continue
        key, colon, value = line.partition(":")
        key = key.strip().lower()
        if name is None or not key:
            continue
        if not colon or not value.strip():
            parent = key
            continue
        found.setdefault(key, value.strip())
        found.setdefault(f"{parent}/{key}", value.strip())
    if name is not None:
        yield name, found
