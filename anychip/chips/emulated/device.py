"""Makes the emulated device known to PyTorch. Once a process: PyTorch has room for one such device, for good."""

from __future__ import annotations

import functools
import importlib.util
from datetime import timedelta
from types import ModuleType
from typing import Any

from anychip.chips.emulated.build import MODULE, library
from anychip.chips.emulated.quirks import Quirks
from anychip.errors import InputError

DEVICE_TYPE = "emulated"
COLLECTIVES = "emulated_ccl"


@functools.cache
def load_device() -> Quirks:
    """Compile if needed, load and register device, `torch.emulated` and collectives; the quirks in force.

    Raises InputError when another vendor's plug-in holds the place, or without a compiler.
    """
    import torch
    from torch.utils.backend_registration import rename_privateuse1_backend

    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise InputError(
            f"cannot be used: the plug-in of {taken!r} is loaded, and PyTorch has room for one.",
            where="the emulated accelerator",
            do="Start with TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
        )
    quirks = Quirks.from_environment()
    native = _import_extension()
    native.configure(quirks.devices, quirks.memory, not quirks.no_fp64)
    rename_privateuse1_backend(DEVICE_TYPE)

    from anychip.chips.emulated import autocast, namespace
    from anychip.chips.emulated.faults.collectives import install_collective_faults
    from anychip.chips.emulated.faults.kernels import install_kernel_faults

    torch._register_device_module(DEVICE_TYPE, namespace)
    autocast.register_rules()
    install_kernel_faults()
    if torch.distributed.is_available():
        _register_collectives(native, quirks)
        install_collective_faults()
    return quirks


def _import_extension() -> ModuleType:
    import torch  # noqa: F401  (its libraries are what the extension links against)

    spec = importlib.util.spec_from_file_location(MODULE, library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _register_collectives(native: ModuleType, quirks: Quirks) -> None:
    import torch.distributed as dist

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        return native.collectives(
            dist.ProcessGroupGloo(store, rank, size, timeout=timeout),
            no_avg=quirks.no_avg,
            no_premul_sum=quirks.no_premul_sum,
            no_int64_reduce=quirks.no_int64_reduce,
            no_fp64=quirks.no_fp64,
            bytes_per_second=quirks.slow_links,
        )

    dist.Backend.register_backend(COLLECTIVES, create, devices=[DEVICE_TYPE])
