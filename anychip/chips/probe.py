"""What a fresh process sees when it starts as training does: torch, plug-in, devices, a first product.

Importing torch imports vendors' plug-ins, and a plug-in without its libraries makes that import fail. So nothing here
happens in the process that asks: `python -m anychip.chips.probe` prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from anychip.chips.cpu import cpu_model
from anychip.chips.detect import CHOICE, known_backends, load_backend, look, refuse_renamed_apis
from anychip.errors import AnychipError

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_MARK = "anychip-probe "  # plug-ins print too
_SECONDS = 180
_ERROR_CHARACTERS = 20_000


def probe(autoload: bool = True) -> dict[str, Any]:
    """Run the probe in a child process. `error` holds what it said when it did not end well."""
    environment = dict(os.environ) if autoload else {**os.environ, AUTOLOAD: "0"}
    command = [sys.executable, "-m", "anychip.chips.probe"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"import torch did not end within {_SECONDS} seconds"}
    found = [line[len(_MARK) :] for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if found:
        result: dict[str, Any] = json.loads(found[-1])
        return result
    return {"error": done.stderr.strip()[-_ERROR_CHARACTERS:] or f"the process ended with code {done.returncode}"}


def _observe() -> dict[str, Any]:
    import torch

    seen: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        refuse_renamed_apis()
        evidence = look([load_backend(name).facts for name in known_backends() if name != "emulated"])
        seen |= {
            "device_type": evidence.device_type,
            "plug_ins": list(evidence.plug_ins),
            "tools": list(evidence.tools),
        }
        seen["failures"] = dict(evidence.failures)
        from anychip.chips.backend import detect_backend

        backend = detect_backend()
        seen["vendor"] = backend.vendor
        seen["chosen"] = os.environ.get(CHOICE, "").strip()
        seen["devices"] = _devices(backend.facts.device_type, backend.device_count())
        seen["bf16"] = backend.multiplies_bf16() if seen["devices"] else None
        seen["collectives"] = _collectives(backend.collective_backend)
        seen["product_error"] = _product_error(backend.device(0)) if seen["devices"] else None
    except AnychipError as error:
        seen["refused"] = {"what": f"{error.where}: {error.what}" if error.where else error.what, "do": error.do}
    except Exception as error:  # a driver's failure is what the doctor wants to hear of
        seen["failed"] = f"{type(error).__name__}: {error}"
    return seen


def _devices(device_type: str, count: int) -> list[dict[str, Any]]:
    """Name and memory in bytes of each device that this process sees."""
    if device_type == "cpu":
        return [{"name": cpu_model(), "memory": None}]
    import torch

    module = torch.get_device_module(device_type)
    properties = [module.get_device_properties(index) for index in range(count)]
    return [{"name": str(p.name), "memory": getattr(p, "total_memory", None)} for p in properties]


def _collectives(backend: str) -> bool:
    """Whether torch.distributed knows the vendor's collective library."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_backend_available(backend)


def _product_error(device: Any) -> float:
    """Largest difference of a small fp32 product from the CPU's fp64 one, as a share of its largest entry."""
    import torch

    left, right = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)).unbind()
    expected = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    print(_MARK + json.dumps(_observe()), flush=True)
