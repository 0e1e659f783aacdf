"""Compiles the device's C++ once for each (source, PyTorch, Python) and keeps it in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from anychip.errors import AnychipError, InputError
from anychip.files import fsync_directory
from anychip.progress import progress

MODULE = "anychip_emulated"
_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-w")


def library() -> Path:
    """The compiled extension module; compiles it (about a minute on two cores) when the cache has none.

    Processes that ask at once wait for the first. Raises InputError without a C++ compiler, AnychipError when it fails.
    """
    built = _cache_folder() / f"{MODULE}-{_fingerprint()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if built.exists():
        return built
    compiler = find_compiler()
    if compiler is None:
        raise InputError(
            "needs a C++ compiler, and none is on PATH.",
            where="the emulated accelerator",
            do="Install one (for example the package g++), or set CXX to one, or use ANYCHIP_CHIP=cpu.",
        )
    built.parent.mkdir(parents=True, exist_ok=True)
    with _lock(built.with_suffix(".lock")):
        if not built.exists():
            _compile(compiler, built)
    return built


def find_compiler() -> str | None:
    """The C++ compiler's path: CXX, else the system's."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anychip" / "emulated"


def _fingerprint() -> str:
    """What the binary depends on."""
    import torch

    digest = hashlib.sha256(repr((torch.__version__, torch.version.git_version, _FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, built: Path) -> None:
    import torch

    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    options = [*_FLAGS, *(f"-I{folder}" for folder in includes), f"-DTORCH_EXTENSION_NAME={MODULE}"]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    sources = sorted(_SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with progress("compiling the emulated accelerator, once", len(sources), "files") as bar:
            commands = [
                [compiler, *options, "-c", str(source), "-o", str(made)]
                for source, made in zip(sources, objects, strict=True)
            ]
            for _ in pool.map(_run, commands):
                bar.advance()
        linked = Path(folder) / built.name
        libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        _run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(linked)])
        with linked.open("rb") as handle:
            os.fsync(handle.fileno())
        linked.replace(built)
    fsync_directory(built.parent)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AnychipError(
            f"does not compile with this compiler and PyTorch: {done.stderr.strip()[-1500:]}",
            where="the emulated accelerator",
            do="It needs a C++20 compiler, PyTorch 2.13's headers and Python's (package python3-dev).",
        )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
