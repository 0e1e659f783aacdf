"""What a user is told when something cannot go on, and the exit code that says which kind it was."""

from __future__ import annotations

import errno

EXIT_BAD_INPUT = 2
EXIT_UNFIT = 3
EXIT_SUSPECT = 4
EXIT_DISK = 5
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def is_of_disk(error: OSError) -> bool:
    """Whether a disk did not take what was written, for want of room or for what may be over soon."""
    return error.errno in _OF_DISK


class AnychipError(Exception):
    """An error whose message is written for the user: one paragraph, no traceback.

    The paragraph says *what* is wrong, *where*, and what to *do* about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", do: str = "") -> None:
        self.what, self.where, self.do = what, str(where), do
        super().__init__(self.paragraph)

    @property
    def paragraph(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head} {self.do}".strip()


class InputError(AnychipError):
    """Bad input: a recipe, a file or an argument that cannot be used (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class UnfitError(AnychipError):
    """A check of a chip, a checkpoint or a conversion failed (exit code 3)."""

    exit_code = EXIT_UNFIT


class SuspectError(UnfitError):
    """This process alone is suspected of wrong results or of memory that changes (exit code 4). What supervises the
    process goes on without the chip."""

    exit_code = EXIT_SUSPECT
