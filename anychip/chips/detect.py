"""Which backend drives the chip at hand.

Device types and collective names do not identify a vendor (six of them call their device cuda), so what can be seen is
collected first (`look`) and judged by a function of that alone (`decide`).
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from anychip.chips.facts import VendorFacts
from anychip.errors import InputError

if TYPE_CHECKING:
    from anychip.chips.backend import Backend

GROUP = "anychip.chips"  # entry points of third parties
CHOICE = "ANYCHIP_CHIP"
BUILT_IN: Mapping[str, str] = {
    "ascend": "anychip.chips.ascend:AscendBackend",
    "cambricon": "anychip.chips.cambricon:CambriconBackend",
    "mthreads": "anychip.chips.mthreads:MooreThreadsBackend",
    "enflame": "anychip.chips.enflame:EnflameBackend",
    "hygon": "anychip.chips.hygon:HygonBackend",
    "amd": "anychip.chips.amd:AmdBackend",
    "metax": "anychip.chips.metax:MetaxBackend",
    "iluvatar": "anychip.chips.iluvatar:IluvatarBackend",
    "kunlunxin": "anychip.chips.kunlunxin:KunlunxinBackend",
    "nvidia": "anychip.chips.nvidia:NvidiaBackend",
    "cpu": "anychip.chips.cpu:CpuBackend",
    "emulated": "anychip.chips.emulated.backend:EmulatedBackend",
}
_NEVER_DETECTED = ("cpu", "emulated")
_LAPTOP_TYPES = ("mps",)  # accelerators that we do not drive and that nobody buys for training


@dataclass(frozen=True)
class Evidence:
    """What can be seen of this machine and its torch."""

    device_type: str | None = None  # of torch's accelerator, when it has a device
    device_names: tuple[str, ...] = ()
    hip: str | None = None  # torch.version.hip
    built_for: str | None = None  # torch.version.cuda or hip: the build expects devices
    plug_ins: tuple[str, ...] = ()  # vendors' modules that are installed
    failures: Mapping[str, str] = field(default_factory=dict)  # module -> why its import failed
    tools: tuple[str, ...] = ()  # vendors' commands on PATH
    markers: tuple[str, ...] = ()  # variables by which a vendor's stack says that it is there
    hidden: tuple[str, ...] = ()  # visible-devices variables that are set, so that no device may be intended


def detect_backend() -> Backend:
    """The backend of the chip at hand: $ANYCHIP_CHIP if set, else what is found, else the CPU.

    Raises InputError for an unknown name, and when a vendor's software is there but shows no device: a job must not
    train on the CPU because a driver failed.
    """
    refuse_renamed_apis()
    chosen = os.environ.get(CHOICE, "").strip()
    if chosen:
        return load_backend(chosen)
    backends = [load_backend(name) for name in known_backends() if name not in _NEVER_DETECTED]
    return load_backend(decide(look(backend.facts for backend in backends), [b.facts for b in backends]))


def known_backends() -> list[str]:
    """Names that $ANYCHIP_CHIP may have: third parties' first, as they are asked first."""
    return [*(name for name in _third_parties() if name not in BUILT_IN), *BUILT_IN]


def load_backend(name: str) -> Backend:
    """The backend of this name, its vendor's plug-in not yet loaded. Raises InputError listing the known names."""
    third_parties = _third_parties()
    if name not in BUILT_IN and name not in third_parties:
        raise InputError(f"there is no backend {name!r}.", where=CHOICE, do=f"Known: {', '.join(known_backends())}.")
    try:
        loaded: Any = third_parties[name].load() if name not in BUILT_IN else _import(BUILT_IN[name])
        backend: Backend = loaded()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the backend cannot be loaded ({type(error).__name__}: {error}).",
            where=f"chip {name}",
            do=f"Correct or remove the package that provides it, or set {CHOICE} to another one.",
        ) from None
    if backend.vendor != name:
        raise InputError(
            f"calls itself {backend.vendor!r}.", where=f"chip {name}", do="Give the entry point its facts' vendor name."
        )
    return backend


def refuse_renamed_apis() -> None:
    """torch_npu can rename CUDA's API to its own, double precision to single included: nothing would be what it
    says."""
    if os.environ.get("TORCH_TRANSFER_TO_NPU", "0").lower() not in ("", "0", "false"):
        raise InputError(
            "rewrites other vendors' calls and turns double precision into single.",
            where="TORCH_TRANSFER_TO_NPU",
            do="Unset it; anychip needs no rewriting.",
        )


def look(vendors: Iterable[VendorFacts]) -> Evidence:
    """Ask torch and the machine. Imports torch and those of the vendors' plug-ins that are installed."""
    import torch

    vendors = list(vendors)
    modules = [facts.plug_in.module for facts in vendors if facts.plug_in and find_spec(facts.plug_in.module)]
    failures = {module: reason for module in modules if (reason := _import_failure(module))}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    names: tuple[str, ...] = ()
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        names = tuple(str(module.get_device_properties(index).name) for index in range(module.device_count()))
    variables = {facts.visible_devices for facts in vendors if facts.visible_devices}
    return Evidence(
        device_type=accelerator.type if accelerator is not None else None,
        device_names=names,
        hip=torch.version.hip,
        built_for=torch.version.hip or torch.version.cuda,
        plug_ins=tuple(modules),
        failures=failures,
        markers=tuple(
            v.marker_variable for v in vendors if v.marker_variable and os.environ.get(v.marker_variable) == "1"
        ),
        tools=tuple(tool for facts in vendors for tool in facts.tools if shutil.which(tool)),
        hidden=tuple(sorted(variable for variable in variables if variable in os.environ)),
    )


def decide(seen: Evidence, vendors: Iterable[VendorFacts]) -> str:
    """The vendor's name, or cpu. Order: what torch was built for, the device's name, the plug-in, the vendor's tool."""
    vendors = list(vendors)
    if seen.device_type is None:
        _refuse_missing_device(seen, vendors)
        return "cpu"
    fitting = [v for v in vendors if v.device_type == seen.device_type and v.hip == (seen.hip is not None)]
    marked = [v for v in fitting if v.marker_variable in seen.markers]
    by_name = [
        v for v in fitting if v.device_name and any(re.search(v.device_name, n, re.I) for n in seen.device_names)
    ]
    by_plug_in = [v for v in fitting if v.plug_in and v.plug_in.module in seen.plug_ins]
    by_tool = [v for v in fitting if set(v.tools) & set(seen.tools) and not set(v.absent_tools) & set(seen.tools)]
    for found in (marked, by_name, by_plug_in, by_tool):
        if found:
            return found[0].vendor
    if fitting:
        return fitting[-1].vendor  # the commonest make of a device type is asked last
    if seen.device_type in _LAPTOP_TYPES:
        return "cpu"
    raise InputError(
        f"torch has an accelerator of type {seen.device_type!r}, which no backend drives.",
        do=f"Set {CHOICE}=cpu to train on the CPU, or write a backend (docs/en/chips.md).",
    )


def _refuse_missing_device(seen: Evidence, vendors: list[VendorFacts]) -> None:
    if seen.hidden:
        return
    expects = [v for v in vendors if v.plug_in and v.plug_in.module in seen.plug_ins]
    if seen.built_for:
        expects += [
            v for v in vendors if not v.plug_in and v.hip == (seen.hip is not None) and set(v.tools) & set(seen.tools)
        ]
    if expects:
        what = expects[0].plug_in.module if expects[0].plug_in else "torch"
        reason = seen.failures.get(what, "it sees no device")
        raise InputError(
            f"{what} is installed for {expects[0].maker or expects[0].vendor}, but {reason}.",
            do=f"`anychip doctor` says why. Set {CHOICE}=cpu to use the CPU on purpose.",
        )


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"its import fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    return None


@cache
def _third_parties() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
