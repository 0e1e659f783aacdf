"""The page of memory that a process shares with whoever watches it: its last collective, and the times of its steps.

The writer pays a copy of some bytes, no system call, and what it wrote can be read while it is stopped, holds the
interpreter's lock, or is dead. Both sides run on one host.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from anychip.parallel.messages import Message
from anychip.train.own_time import SHARED_PHASES, StepTime

_MESSAGE = struct.Struct("<?QQ20s60s")  # inside it, number, bytes, operation, group
_ROW = struct.Struct(f"<QQd{len(SHARED_PHASES)}d")  # number of the row (0: being written), step, seconds, own seconds
_ROWS, _ROWS_BEGIN = 64, 128
_SIZE = _ROWS_BEGIN + _ROWS * _ROW.size


class PageWriter:
    """Creates the page; one that an earlier process left is emptied."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as handle:
            handle.write(bytes(_SIZE))  # a page that has no place on the disk yet would be SIGBUS once it is full
            handle.flush()
            self._memory = mmap.mmap(handle.fileno(), _SIZE)
        self._last: Message | None = None

    def write_message(self, message: Message) -> None:
        if message is self._last:  # begun before, waited for now
            self._memory[0] = 1
            return
        self._last = message
        operation, group = message.operation.encode(), message.group.encode()
        _MESSAGE.pack_into(self._memory, 0, True, message.number, message.bytes, operation, group)

    def write_message_done(self) -> None:
        self._memory[0] = 0

    def write_step(self, row: StepTime) -> None:
        """Readers take a row by its number, which is written when the rest is there."""
        place = _place(row.number)
        _ROW.pack_into(self._memory, place, 0, row.step, row.seconds, *row.own)
        struct.pack_into("<Q", self._memory, place, row.number)

    def close(self) -> None:
        self._memory.close()


def read_message(path: Path) -> tuple[Message, bool] | None:
    """The last collective of a process, and whether it is still inside; None while there was none."""
    try:
        inside, number, size, operation, group = _MESSAGE.unpack_from(path.read_bytes()[:_ROWS_BEGIN])
    except (OSError, struct.error):
        return None
    names = [text.rstrip(b"\0").decode("utf-8", "replace") for text in (operation, group)]
    return (Message(number, names[0], names[1], size), inside) if number else None


def read_steps(path: Path, after: int) -> list[StepTime]:
    """The steps whose number is above `after`, as many as the page still holds, in order."""
    try:
        page = path.read_bytes()
    except OSError:
        return []
    if len(page) < _SIZE:
        return []
    rows = [_ROW.unpack_from(page, _place(number)) for number in range(_ROWS)]
    found = [StepTime(row[0], row[1], row[2], row[3:]) for row in rows if row[0] > after]
    return sorted((row for row in found if _is_sound(row)), key=lambda row: row.number)


def _place(number: int) -> int:
    return _ROWS_BEGIN + (number % _ROWS) * _ROW.size


def _is_sound(row: StepTime) -> bool:
    return all(math.isfinite(value) and value >= 0.0 for value in (row.seconds, *row.own))
