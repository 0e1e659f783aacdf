from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from disk_shim import DiskShim, build_shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs a C compiler")
    tried = subprocess.run(["ls", "/"], env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True)
    if tried.returncode or tried.stderr:
        pytest.skip("this system does not let a library stand in front of the C library's")
    return library


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if possible: a flush is what the shim says it is, and thousands of real ones take minutes."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def shim(memory: Path) -> DiskShim:
    return DiskShim(memory / "control")


@pytest.fixture
def shimmed(shim: DiskShim, shim_library: Path) -> Mapping[str, str]:
    """The environment of a process whose calls the shim sees."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **shim.environment(shim_library)}
