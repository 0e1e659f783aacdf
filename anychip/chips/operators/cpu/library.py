"""Compiles csrc/ for this CPU and loads it. The functions take addresses: no header of PyTorch is needed."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from anychip.chips.compiling import cache_folder, compiled_once, find_compiler, fingerprint, run_compiler

_SOURCES = Path(__file__).parent / "csrc"
_NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
_INSTRUCTIONS = tuple(f"-m{name.replace('_', '')}" for name in _NEEDED)
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-w", *_INSTRUCTIONS)


def _has_instructions() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return all(capabilities.get(name, False) for name in _NEEDED)


RUNS_HERE = _has_instructions()  # this CPU; a constant, which a compiler can see


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels; compiles them (some seconds) when the cache has none. OpenMP's threads are PyTorch's.

    Raises RuntimeError without a compiler or when it fails.
    """

    def compile(made: Path) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("needs a C++ compiler, and none is on PATH")
        run_compiler([compiler, *_FLAGS, *map(str, sorted(_SOURCES.glob("*.cpp"))), "-o", str(made)])

    library = ctypes.CDLL(
        str(compiled_once(cache_folder("cpu") / f"kernels-{fingerprint(_SOURCES, _FLAGS)}.so", compile))
    )
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.pack_weight.argtypes = address, count, count, address
    for product in (library.packed_product, library.packed_product_wide):
        product.argtypes = address, count, count, count, address, address, count, address
    library.cached_attention.argtypes = *(address,) * 7, count, address, ctypes.c_float
    library.rms_norm.argtypes = address, address, ctypes.c_float, address, address, count, count
    library.rms_norm_backward.argtypes = *(address,) * 6, count, count
    return library
