"""Compiles the device's C++ once for each (source, PyTorch, Python) and keeps it in the user's cache."""

from __future__ import annotations

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anychip.chips.compiling import (
    CompilerFailed,
    cache_folder,
    compiled_once,
    find_compiler,
    fingerprint,
    run_compiler,
)
from anychip.errors import AnychipError, InputError
from anychip.progress import progress

MODULE = "anychip_emulated"
_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-w")


def library() -> Path:
    """The compiled extension module; compiles it (about a minute on two cores) when the cache has none.

    Raises InputError without a C++ compiler, AnychipError when it fails.
    """
    import torch

    built = fingerprint(_SOURCES, (torch.__version__, torch.version.git_version, _FLAGS))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return compiled_once(cache_folder("emulated") / f"{MODULE}-{built}{suffix}", _compile)


def _compile(made: Path) -> None:
    import torch

    compiler = find_compiler()
    if compiler is None:
        raise InputError(
            "needs a C++ compiler, and none is on PATH.",
            where="the emulated accelerator",
            do="Install one (for example the package g++), or set CXX to one, or use ANYCHIP_CHIP=cpu.",
        )
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    options = [*_FLAGS, *(f"-I{folder}" for folder in includes), f"-DTORCH_EXTENSION_NAME={MODULE}"]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    sources = sorted(_SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)
    objects = [made.with_name(f"{source.stem}.o") for source in sources]
    commands = [
        [compiler, *options, "-c", str(source), "-o", str(object)]
        for source, object in zip(sources, objects, strict=True)
    ]
    title = "compiling the emulated accelerator, once"
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress(title, len(sources), "files") as bar:
        for _ in pool.map(_run, commands):
            bar.advance()
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    _run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(made)])


def _run(command: list[str]) -> None:
    try:
        run_compiler(command)
    except CompilerFailed as failed:
        raise AnychipError(
            f"does not compile with this compiler and PyTorch: {failed}",
            where="the emulated accelerator",
            do="It needs a C++20 compiler, PyTorch 2.13's headers and Python's (package python3-dev).",
        ) from None
