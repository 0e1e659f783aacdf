"""Which batch a step reads when some batches were left out on purpose."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from anychip.errors import InputError
from anychip.files import write_json
from anychip.rundir import RunDirectory

_RANGES = TypeAdapter(list[tuple[int, int]])


@dataclass(frozen=True)
class DataCursor:
    """Batches [start, stop) that no step reads: after a spike, training goes on behind the batches that led to it.

    Ranges are in the order in which they were left out, ascending and apart.
    """

    skipped: tuple[tuple[int, int], ...] = ()

    def position(self, step: int) -> int:
        """The number of the batch that `step` (from 0) reads."""
        for start, stop in self.skipped:
            if step < start:
                break
            step += stop - start
        return step

    def step(self, position: int) -> int | None:
        """The step that reads this batch; None for one left out."""
        before = 0
        for start, stop in self.skipped:
            if start <= position < stop:
                return None
            if position >= stop:
                before += stop - start
        return position - before

    def without(self, start: int, stop: int) -> DataCursor:
        """This cursor, which in addition leaves out the batches [start, stop); none behind them may be left out yet."""
        if self.skipped and self.skipped[-1][1] == start:
            return DataCursor((*self.skipped[:-1], (self.skipped[-1][0], stop)))
        return DataCursor((*self.skipped, (start, stop)))

    def as_json(self) -> list[list[int]]:
        return [list(pair) for pair in self.skipped]

    @classmethod
    def of_json(cls, value: object) -> DataCursor:
        ranges = _RANGES.validate_python(value)
        edges = [edge for pair in ranges for edge in pair]
        if any(start >= stop for start, stop in ranges) or edges != sorted(edges) or any(edge < 0 for edge in edges):
            raise ValueError("ranges of batches must be ascending and apart")
        return cls(tuple(ranges))

    @classmethod
    def of_run(cls, run: RunDirectory) -> DataCursor:
        """What the run recorded with `write`. Raises InputError for a file that makes no sense."""
        if not run.skipped.is_file():
            return cls()
        try:
            return cls.of_json(_RANGES.validate_json(run.skipped.read_bytes()))
        except (ValidationError, ValueError) as error:
            raise InputError(
                f"is not a list of ranges of batches ({error}).",
                where=run.skipped,
                do="Remove it: the next start of the training writes it again.",
            ) from error

    def write(self, run: RunDirectory) -> None:
        if self.skipped or run.skipped.is_file():
            write_json(run.skipped, self.as_json())
