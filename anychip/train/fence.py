"""One writer a generation: a process whose generation was given up neither logs a step nor publishes a checkpoint.

Whoever supervises several hosts starts a new generation only after the lease of the old one has run out. The lease is
a file in this host's memory that the host's agent renews and its processes inherit: it holds the time (time.monotonic,
one clock for all processes of a host) until which the generation may go on. An agent that hangs renews nothing. Beside
that, a checkpoint is published only while the run directory names no newer generation.
"""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from anychip.errors import AnychipError

LEASE_VARIABLE = "ANYCHIP_LEASE"  # descriptor of an open file
GENERATION_VARIABLE = "ANYCHIP_GENERATION"  # NUMBER:PATH of the record of the newest generation
_TIME = struct.Struct("=d")


class Fenced(AnychipError):
    """This process belongs to a generation that is over."""


def open_lease() -> int:
    """A descriptor for processes to inherit; not valid before it is renewed."""
    descriptor = os.memfd_create("anychip-lease", os.MFD_CLOEXEC)
    renew_lease(descriptor, 0.0)
    return descriptor


def renew_lease(descriptor: int, until: float) -> None:
    """`until` by time.monotonic."""
    os.pwrite(descriptor, _TIME.pack(until), 0)


@dataclass(frozen=True)
class Fence:
    """What this process may still do. Without a lease or a record nothing is forbidden."""

    lease: int | None = None
    generation: int = 0
    record: Path | None = None

    def check_lease(self) -> None:
        """Raises Fenced when this host's generation was given up; costs a microsecond."""
        if self.lease is None:
            return
        try:
            (until,) = _TIME.unpack(os.pread(self.lease, _TIME.size, 0))
        except (OSError, struct.error):
            raise Fenced("The lease of this generation cannot be read.") from None
        if time.monotonic() > until:
            raise Fenced(f"The lease of generation {self.generation} ran out: this host was given up.")

    def check(self) -> None:
        """Also raises Fenced when the run directory names a newer generation. For what others will read."""
        self.check_lease()
        if self.record is None:
            return
        try:
            newest = int(json.loads(self.record.read_bytes())["generation"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Fenced(f"cannot be read ({error}); nothing is published.", where=self.record) from None
        if newest != self.generation:
            raise Fenced(f"This is generation {self.generation}, and the run is at {newest}.", where=self.record)


@cache
def fence() -> Fence:
    """That of this process, from its environment."""
    lease, (number, _, record) = os.environ.get(LEASE_VARIABLE), os.environ.get(GENERATION_VARIABLE, "").partition(":")
    return Fence(int(lease) if lease else None, int(number or 0), Path(record) if record else None)
