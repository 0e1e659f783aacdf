"""The chain of a run: RUN/attest/chain.jsonl, one line a link, each with the SHA-256 of the line before it.

A line is appended and flushed to disk before what it announces is done. A process that dies while it writes leaves a
torn last line: whoever opens the chain next cuts it off and says so with a link of its own. While the disk fails, lines
wait in memory, as rows of the training log do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anychip.attest.check.findings import canonical, sha256
from anychip.attest.check.history import GENESIS
from anychip.errors import InputError, UnfitError
from anychip.files import fsync_directory, lock_alone
from anychip.train.fence import fence

_LOCK_SECONDS = 10.0  # one that was killed may still be on its way out


@dataclass(frozen=True)
class Link:
    """A line of the chain; `digest` is by what others name it."""

    kind: str
    body: dict[str, Any]
    digest: str


class Chain:
    """The chain, opened to append; one process at a time holds it. Use as a context, or `close` it."""

    def __init__(self, path: Path) -> None:
        """Raises UnfitError when a line does not follow the one before it, InputError while another process holds the
        chain."""
        self._path, self._waiting = path, b""
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._file = path.open("a+b", buffering=0)
        if is_new:
            fsync_directory(path.parent)
        try:
            self._lock()
            self.links = list(read_links(path))
            self._end = self._cut_torn_line()
        except BaseException:
            self._file.close()
            raise

    @property
    def head(self) -> str:
        return self.links[-1].digest if self.links else GENESIS

    def append(self, kind: str, body: dict[str, Any]) -> str:
        """Add a link; returns its digest. Raises Fenced when this process belongs to a generation that is over."""
        fence().check()
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = canonical({"n": len(self.links), "parent": self.head, "time": now, "kind": kind, "body": body})
        self.links.append(Link(kind, body, sha256(line)))
        self._waiting += line + b"\n"
        try:
            self.flush()
        except OSError as error:
            print(
                f"warning: {self._path} cannot be written ({error.strerror}); training goes on, its links are kept",
                file=sys.stderr,
                flush=True,
            )
        return self.head

    def flush(self) -> None:
        """Write what is waiting, behind the last whole line. Raises OSError when the disk does not take it."""
        if not self._waiting:
            return
        self._file.truncate(self._end)  # a full disk may have taken half a line
        written = os.write(self._file.fileno(), self._waiting)
        if written != len(self._waiting):
            raise OSError(28, os.strerror(28))
        os.fsync(self._file.fileno())
        self._end, self._waiting = self._end + written, b""

    def close(self) -> None:
        with suppress(OSError):
            self.flush()
        self._file.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if not lock_alone(self._file, _LOCK_SECONDS):
            do = "Run one training per run directory."
            raise InputError("another process writes this chain.", where=self._path, do=do)

    def _cut_torn_line(self) -> int:
        """Drop what a dead process left of a line, and say so. Returns the length of the chain."""
        data = self._path.read_bytes()
        self._end = data.rfind(b"\n") + 1
        if torn := data[self._end :]:  # the link that says so takes its place
            self.append("repair", {"why": "a process died while it wrote", "bytes": len(torn), "sha256": sha256(torn)})
        return self._end


def read_links(path: Path) -> Iterator[Link]:
    """The whole lines of a chain, each checked against the one before it. Raises UnfitError."""
    if not path.is_file():
        return
    head = GENESIS
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        try:
            row = json.loads(line)
            kind, body, good = str(row["kind"]), dict(row["body"]), (row["n"], row["parent"]) == (number, head)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UnfitError(
                f"link {number} does not follow the one before it: the chain was changed or is damaged.",
                where=path,
                do="Restore attest/ from a copy. Without it, nobody can check where the weights come from.",
            )
        head = sha256(line)
        yield Link(kind, body, head)
