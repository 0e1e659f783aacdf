"""Reading the CSV formats that `validate` and `calibrate` take, told apart by their columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from anychip.errors import InputError
from anychip.plan.rows.published import RUN_COLUMNS, published_run
from anychip.plan.rows.run import Incomplete, Run, Skipped
from anychip.plan.rows.vtrain import VTRAIN_SINGLE_COLUMNS, vtrain_run


def read_rows(path: Path) -> tuple[list[Run], list[Skipped]]:
    """Read a CSV of either format. Raises InputError naming the columns that are missing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            header = [name.strip() for name in reader.fieldnames or ()]
            rows = [{(key or "").strip(): value for key, value in row.items()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read: {error}.", where=path, do="Give a CSV file in UTF-8.") from None
    parse = _parser_of(header, path)
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for number, row in enumerate(rows, start=1):
        name = row.get("id") or f"row-{number}"
        try:
            runs.append(parse(row, number))
        except Incomplete as reason:
            skipped.append(Skipped(name, str(reason)))
        except ValueError as error:
            raise InputError(f"row {number} ({name}) has a value that is no number: {error}.", where=path) from None
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
