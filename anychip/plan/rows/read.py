"""Reading the CSV formats that `validate` and `calibrate` take, told apart by their columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from anychip.errors import InputError
from anychip.plan.rows.check import checked
from anychip.plan.rows.published import RUN_COLUMNS, published_run
from anychip.plan.rows.run import Incomplete, Run, Skipped
from anychip.plan.rows.vtrain import VTRAIN_MULTI_COLUMNS, VTRAIN_SINGLE_COLUMNS, vtrain_run

_SPELLED = {name.lower(): name for name in (*RUN_COLUMNS, *VTRAIN_MULTI_COLUMNS)}
_DELIMITERS = (",", ";", "\t", "|")


def read_rows(path: Path) -> tuple[list[Run], list[Skipped]]:
    """Read a CSV of either format; rows that cannot be used are skipped, each with its reason.

    Raises InputError for a file that is no table, columns that are missing and columns that are there twice.
    """
    header, lines = _table(path)
    parse = _parser_of(header, path)
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for number, cells in enumerate(lines, start=1):
        row = dict(zip(header, cells, strict=False))
        name = row.get("id", "").strip() or f"row-{number}"
        try:
            if len(cells) > len(header):
                raise Incomplete(
                    f"row {number} has {len(cells)} cells for {len(header)} columns: quote cells that hold a separator"
                )
            runs.append(checked(parse(row, number)))
        except Incomplete as reason:
            skipped.append(Skipped(name, str(reason)))
        except (ValueError, ArithmeticError) as error:  # of numbers in its notes
            skipped.append(Skipped(name, f"row {number} cannot be read: {error}"))
    return runs, skipped


def read_files(paths: Sequence[Path]) -> tuple[list[Run], list[Skipped]]:
    """Read several files. Raises InputError when no row of them is complete enough."""
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for path in paths:
        read, left = read_rows(path)
        runs += read
        skipped += left
    if not runs:
        raise InputError(
            "no row is complete enough to be predicted.",
            where=paths[0],
            do=f"The first reason: {skipped[0].reason}." if skipped else "The file has no rows.",
        )
    return runs, skipped


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns as the formats spell them, and the cells of every row that has any."""
    text = _text(path)
    delimiter = max(_DELIMITERS, key=lambda mark: len(_known(text, mark)))
    try:
        lines = [cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(cells)]
    except csv.Error as error:
        raise InputError(f"is no table: {error}.", where=path, do="Give a CSV file.") from None
    if not lines:
        raise InputError("is empty.", where=path, do="Give a CSV file with a line of column names.")
    header = [_SPELLED.get(name.strip().lower(), name.strip()) for name in lines[0]]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise InputError(
            f"has the columns {', '.join(twice)} more than once.", where=path, do="Keep one column of each name."
        )
    return header, lines[1:]


def _known(text: str, delimiter: str) -> set[str]:
    """The column names of either format in the first line, were it separated so."""
    names = text.lstrip().split("\n", 1)[0].split(delimiter)
    return {name.strip(' "\r').lower() for name in names} & set(_SPELLED)


def _text(path: Path) -> str:
    """The file's text: UTF-8, or UTF-16 that says so in its first two bytes."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError("there is no such file.", where=path, do="Give a CSV of measured runs.") from None
    except IsADirectoryError:
        raise InputError("is a folder.", where=path, do="Name the CSV file in it.") from None
    except OSError as error:
        why = (error.strerror or "unknown error").lower()
        raise InputError(f"cannot be read: {why}.", where=path, do="Give a CSV of measured runs.") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"is no text in UTF-8 (byte {error.start + 1}).", where=path, do="Save the table as CSV in UTF-8."
        ) from None


def _parser_of(header: list[str], path: Path) -> Callable[[dict[str, str], int], Run]:
    """The format is told by its columns; the nearer format's missing ones are named."""
    if not set(VTRAIN_SINGLE_COLUMNS) - set(header):
        return vtrain_run
    if not (missing := [name for name in RUN_COLUMNS if name not in header]):
        return published_run
    vtrain_missing = [name for name in VTRAIN_SINGLE_COLUMNS if name not in header]
    if len(vtrain_missing) < len(VTRAIN_SINGLE_COLUMNS) / 2:
        missing = vtrain_missing
    raise InputError(
        f"lacks the columns {', '.join(missing)}.",
        where=path,
        do="Use exactly the columns of runs.csv, or those of vTrain's files (`# GPUs, global batch, ...`).",
    )
