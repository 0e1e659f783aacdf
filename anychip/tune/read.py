"""Files of dialogs: JSON lines, or one JSON list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from anychip.errors import InputError
from anychip.tune.dialogs import Dialog
from anychip.tune.forms import EXAMPLE, loads, parse_dialog

Parsed = TypeVar("Parsed")


def read_dialogs(path: Path, form: str = "auto") -> list[Dialog]:
    """Every dialog of a .jsonl file, or of a .json file that holds one list, in any of the forms or in a given one.

    Raises InputError naming the file and line for anything that is not a dialog to learn from.
    """
    return read_records(path, lambda record, where: parse_dialog(record, form, where), EXAMPLE)


def read_records(path: Path, parse: Callable[[object, str], Parsed], example: str) -> list[Parsed]:
    """What `parse` makes of every record, given with the place that errors name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror}).", where=path, do=f"Give a file whose lines look like {example}"
        ) from None
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8.", where=path, do=f"Each line looks like {example}") from None
    records = _items(text, path) if path.suffix == ".json" else _lines(text, path, example)
    parsed = [parse(record, where) for record, where in records]
    if not parsed:
        raise InputError("holds no dialogs.", where=path, do=f"Each line looks like {example}")
    return parsed


def _lines(text: str, path: Path, example: str) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = loads(line)
            except ValueError:
                raise InputError("is not valid JSON.", where=where, do=f"Each line looks like {example}") from None
            yield record, where


def _items(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    try:
        records = loads(text)
    except ValueError:
        raise InputError("is not valid JSON.", where=path, do="JSON lines belong in a file named .jsonl.") from None
    if not isinstance(records, list):
        raise InputError("is not a JSON list.", where=path, do="Put the dialogs into one list.")
    yield from ((record, f"{path}, item {number}") for number, record in enumerate(records, start=1))
