"""Published runs as workloads and layouts. A row that does not say enough is skipped with a reason."""

from anychip.plan.rows.published import RUN_COLUMNS
from anychip.plan.rows.read import read_files, read_rows
from anychip.plan.rows.run import Run, Skipped, Software
from anychip.plan.rows.vtrain import VTRAIN_MULTI_COLUMNS, VTRAIN_SINGLE_COLUMNS

__all__ = [
    "RUN_COLUMNS",
    "VTRAIN_MULTI_COLUMNS",
    "VTRAIN_SINGLE_COLUMNS",
    "Run",
    "Skipped",
    "Software",
    "read_files",
    "read_rows",
]
