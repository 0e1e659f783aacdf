"""Running a program that nobody has read: with limits always, cut off from network and files where the kernel allows.

The program runs in a Python of its own, in an empty folder and an empty environment. Limits hold everywhere: CPU time,
wall time, memory, size of files, open files, no core dumps. Where Linux lets a process have namespaces of its own, it
also has no network, reaches no other process, takes with it at its end what it started (root's alone can start any),
and can write nowhere but into a small folder in memory; started by root, it runs as nobody if nobody can read Python's
files. Reading is not prevented: what its user can read, it can.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

Isolation = Literal["nobody", "namespaces", "none"]
_CHILD = Path(__file__).with_name("child.py")
_SHOWN_BYTES = 64 << 10


@dataclass(frozen=True)
class Limits:
    """CPU seconds and bytes of memory; twice the seconds, and two more, may pass on the clock."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20

    @property
    def wall_seconds(self) -> float:
        return 2 * self.seconds + 2


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ran to its last line; one that exits before, even with code 0, did not. `isolated`: it had
    neither network nor files to write. What it printed, the beginning."""

    passed: bool
    isolated: bool
    output: str
    errors: str


def run_python(program: str, limits: Limits = Limits()) -> Outcome:
    """Run `program` to its end or to a limit."""
    return _run(program, limits, isolation())


@cache
def isolation() -> Isolation:
    """How far this kernel lets a program be cut off from network and files, tried once."""
    if sys.platform != "linux":
        return "none"
    kinds: list[Isolation] = ["nobody"] if os.getuid() == 0 else []
    for kind in [*kinds, "namespaces"]:
        if _run("import decimal, random, unittest", Limits(), kind).passed:
            return kind
    return "none"


def _run(program: str, limits: Limits, isolation: Isolation) -> Outcome:
    secret = secrets.token_hex(16)
    order = {"program": program, "secret": secret, **vars(limits), "isolation": isolation}
    with tempfile.TemporaryDirectory(prefix="anychip-sandbox-") as folder, contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        said = _said(order, Path(folder), out, err, limits.wall_seconds)
        return Outcome(secret.encode() in said, isolation != "none", _shown(out), _shown(err))


def _said(order: dict[str, object], folder: Path, out: IO[bytes], err: IO[bytes], wall_seconds: float) -> bytes:
    """What the child wrote into its pipe: the secret, if it came so far."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(writing)],
            cwd=folder,
            env={"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(order).encode(), timeout=wall_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.set_blocking(reading, False)
        try:
            said = os.read(reading, 256)
        except BlockingIOError:
            said = b""
        os.close(reading)
    return said


_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_in(answer: str) -> str:
    """The last fenced block of a model's answer, or all of it."""
    blocks = _FENCE.findall(answer)
    return blocks[-1] if blocks else answer


def _shown(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_SHOWN_BYTES).decode("utf-8", "replace")
