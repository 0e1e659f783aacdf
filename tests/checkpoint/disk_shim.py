"""A disk that fails, or a process that dies, at the k-th system call on a folder: the Python side of disk_shim.c."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

KILL, FAIL = 1, 2
READS, WRITES, FLUSHES, CHANGES, OTHER = 1, 2, 4, 8, 16
EVERYTHING = READS | WRITES | FLUSHES | CHANGES | OTHER
FOR_EVER = 1 << 62


class _Page(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("lock", "action", "error", "kinds")),
        *((name, ctypes.c_int64) for name in ("count", "at", "until", "delay_us", "struck", "most")),
        ("root", ctypes.c_char * 1024),
        ("trace", ctypes.c_char * 1024),
    )


def build_shim(folder: Path) -> Path | None:
    """The compiled library; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=100)
    return library


class DiskShim:
    """The control page that this process and those started with `environment` share."""

    def __init__(self, page: Path) -> None:
        self.path = page
        if not page.exists():
            page.write_bytes(bytes(ctypes.sizeof(_Page)))
        with page.open("r+b") as handle:
            self._page = _Page.from_buffer(mmap.mmap(handle.fileno(), ctypes.sizeof(_Page)))

    def environment(self, library: Path) -> Mapping[str, str]:
        return {"LD_PRELOAD": str(library), "DISK_SHIM_CONTROL": str(self.path)}

    def arm(
        self,
        root: Path,
        action: int = 0,
        at: int = 1,
        *,
        until: int | None = None,
        error: int = 0,
        kinds: int = EVERYTHING,
        most: int = FOR_EVER,
        trace: Path | None = None,
        delay_us: int = 0,
    ) -> None:
        """From now on, calls below `root` of these kinds with numbers from `at`, before `until` (default: only that
        one), are struck, `most` of them at most."""
        page = self._page
        page.root = b""
        page.lock, page.action, page.error, page.kinds = 0, action, error, kinds
        page.count, page.at, page.until = 0, at, at + 1 if until is None else until
        page.delay_us, page.struck, page.most = delay_us, 0, most
        page.trace = os.fsencode(trace) if trace else b""
        page.root = os.fsencode(root.resolve())

    def disarm(self) -> None:
        self._page.root, self._page.lock = b"", 0

    @property
    def count(self) -> int:
        """Calls since `arm`."""
        return int(self._page.count)

    @property
    def struck(self) -> int:
        return int(self._page.struck)
