"""What can be wrong with a release, and reading files of unknown origin without trusting them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Reason = Literal[
    "form",  # not what such a file looks like
    "bytes", "missing file", "extra file",  # the folder is not the one that was signed
    "signature", "key",  # missing or not of what it stands beside; made with another key than the one that was named
    "order", "missing link", "replayed link", "truncated",  # links are not those that were made
    "fork",  # training goes on from another state than the one it had reached
    "steps", "data", "chip", "software",  # what was trained, from what, and on what
    "inputs",  # something that was pinned is not there, or is not what the links name
    "weights",  # the weights are not of a checkpoint of this chain
]  # fmt: skip
_LARGEST_FILE = 1 << 28
_DEEPEST = 32


@dataclass(frozen=True)
class Problem:
    reason: Reason
    what: str


class Refused(Exception):
    """A problem behind which nothing of the same thing can be read."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(reason, what)


@dataclass
class Findings:
    """What a check found; `shown` counts only without problems."""

    problems: list[Problem] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)

    def problem(self, reason: Reason, what: str) -> None:
        self.problems.append(Problem(reason, what))


def canonical(value: Any) -> bytes:
    """The one way in which a JSON value is written here: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, name: str) -> Any:
    """A JSON value written canonically: then no byte of it is without meaning."""
    try:
        value = json.loads(data)
        if canonical(value) == data and not _deeper_than(value, _DEEPEST):
            return value
    except (ValueError, RecursionError, OverflowError):
        pass
    raise Refused("form", f"{name} is not JSON in canonical form.")


def read(path: Path, name: str) -> bytes:
    """A file, not a link, of at most 256 MiB."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as handle:
            data = handle.read(_LARGEST_FILE + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
            if data is not None and len(data) <= _LARGEST_FILE:
                return data
    except FileNotFoundError:
        raise Refused("missing file", f"{name} is not there.") from None
    except OSError as error:
        raise Refused("form", f"{name} cannot be read ({error.strerror}).") from None
    raise Refused("form", f"{name} is not a file, or larger than {_LARGEST_FILE} bytes.")


def need(value: Any, key: str, kind: type, *, optional: bool = False) -> Any:
    """`value[key]`, of this type; or None where that is allowed."""
    found = value.get(key) if isinstance(value, dict) else None
    if type(found) is not kind and not (optional and found is None):
        raise Refused("form", f"the field {key} is missing or of another type.")
    return found


def need_texts(value: Any, key: str) -> list[str]:
    found: list[str] = need(value, key, list)
    if not all(type(item) is str for item in found):
        raise Refused("form", f"the field {key} holds something else than texts.")
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper_than(item, levels - 1) for item in inner)
