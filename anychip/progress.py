"""A progress bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PLAIN_LINE_EVERY_SECONDS = 10.0


class Progress:
    """Counts work that is done; shows it at most a few times a second."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0.0
        self._started = self._shown = time.monotonic()

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        if time.monotonic() - self._shown >= _PLAIN_LINE_EVERY_SECONDS:
            self._shown = time.monotonic()
            self._show()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._started
        line = f"{self.title}: {self.done:,.0f} {self.unit}"
        if self.total and self.done:
            left = elapsed * (self.total - self.done) / self.done
            line = f"{self.title}: {self.done / self.total:.0%} of {self.total:,.0f} {self.unit}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


class _QuietProgress(Progress):
    """The same counter of a process that leaves the showing to another."""

    def _show(self) -> None:
        pass


class _TerminalProgress(Progress):
    """The same counter drawn by rich."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        super().__init__(title, total, unit)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._task = self.bar.add_task(title, total=total)

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        self.bar.advance(self._task, amount)


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "", *, quiet: bool = False) -> Iterator[Progress]:
    """Yield a counter whose `advance(n)` is shown to the user on standard error; `quiet` only counts."""
    if quiet:
        yield _QuietProgress(title, total, unit)
    elif sys.stderr.isatty():
        terminal = _TerminalProgress(title, total, unit)
        with terminal.bar:
            yield terminal
    else:
        yield Progress(title, total, unit)
