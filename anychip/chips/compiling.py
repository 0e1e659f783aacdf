"""C++ that is compiled on the machine it runs on, once, and kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anychip.files import fsync_directory


def find_compiler() -> str | None:
    """The C++ compiler's path: CXX, else the system's."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def cache_folder(kind: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anychip" / kind


def fingerprint(sources: Path, more: object) -> str:
    """What a binary depends on: the files of a folder, and `more` by its repr."""
    digest = hashlib.sha256(repr(more).encode())
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def compiled_once(built: Path, compile: Callable[[Path], None]) -> Path:
    """`built`, which `compile(path)` makes when it is missing. Processes that ask at once wait for the first; what is
    there is whole."""
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with _lock(built.with_suffix(".lock")):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                made = Path(folder) / built.name
                compile(made)
                with made.open("rb") as handle:
                    os.fsync(handle.fileno())
                made.replace(built)
            fsync_directory(built.parent)
    return built


class CompilerFailed(RuntimeError):
    """What the compiler said."""


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompilerFailed(done.stderr.strip()[-1500:])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
