"""What can be wrong with a release, and reading files of unknown origin without trusting them."""

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    "inputs", "weights",  # what was pinned is not there, or is another; weights are of no checkpoint of this chain
]  # fmt: skip
ATTESTATION = "attestation"  # the folder in a release that holds what is read here


class Problem(Exception):
    """Raised where nothing behind it can be read; noted elsewhere."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason, self.what = reason, what


@dataclass
class Findings:
    """What a check found; `shown` counts only without problems."""

    problems: list[Problem] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)

    def problem(self, reason: Reason, what: str) -> None:
        self.problems.append(Problem(reason, what))

    @contextmanager
    def noting(self, where: str = "") -> Iterator[None]:
        """A problem ends what is done here; it is noted, and the check goes on behind it."""
        try:
            yield
        except Problem as problem:
            self.problem(problem.reason, where + problem.what)
        except FileNotFoundError as error:
            self.problem("missing file", f"{where}{Path(str(error.filename)).name} is not there.")
        except (OSError, RecursionError) as error:
            self.problem("form", f"{where}something cannot be read ({error}).")


def canonical(value: Any) -> bytes:
    """The one way in which a JSON value is written here: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read(path: Path, name: str) -> bytes:
    """A file, not a link, of at most 256 MiB."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 28:
        raise Problem("form", f"{name} is not a file, or larger than that.")
    return path.read_bytes()


def parse(data: bytes, name: str) -> Any:
    """A JSON value written canonically: then no byte of it is without meaning."""
    with suppress(ValueError, RecursionError, OverflowError):
        value = json.loads(data)
        if canonical(value) == data:
            return value
    raise Problem("form", f"{name} is not JSON in canonical form.")


def need(value: Any, key: str, kind: Any) -> Any:
    """`value[key]`, of this type. A key that is not there is None, and True is no number."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise Problem("form", f"the field {key} is missing or of another type.")
    return found


def take(value: Any, **kinds: Any) -> list[Any]:
    """Several fields at once, in the order of their names here."""
    return [need(value, key, kind) for key, kind in kinds.items()]


def take_all(value: Any, **kinds: Any) -> list[Any]:
    """As `take`, of an object that has no other fields."""
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise Problem("form", f"there should be the fields {', '.join(kinds)}, and no others.")
    return take(value, **kinds)
