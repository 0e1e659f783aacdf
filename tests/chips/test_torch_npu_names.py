"""Every name of torch_npu that we call or set exists in the real wheel. Nothing is computed: there is no driver here.

    pip install --no-deps --target FOLDER torch-npu==2.13.0
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=FOLDER python -m pytest tests/chips/test_torch_npu_names.py

The wheel cannot be imported without the driver's libraries, so small ones that define their symbols and do nothing are
compiled. Names and texts say nothing about a device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from anychip.chips.ascend import FACTS
from anychip.chips.operators.ascend import OVERRIDES

DRIVER = ("libhccl", "libascendcl", "libge_runner", "libgraph", "libacl_op_compiler", "libacl_tdt_channel")
CALLED = (  # what accelerator.py and probe.py ask of the device's module
    "device_count", "set_device", "synchronize", "is_bf16_supported", "get_device_properties",
    "memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved",
)  # fmt: skip
OPERATORS = sorted({name for o in OVERRIDES.values() if o.module == "torch_npu" for name in o.functions})


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Folder of the installed torch_npu package."""
    try:
        distribution = metadata.distribution("torch-npu")
    except metadata.PackageNotFoundError:
        pytest.skip("torch-npu is not installed; the head of this file says how to install it aside")
    return Path(str(distribution.locate_file("torch_npu")))


@pytest.fixture(scope="module")
def library(wheel: Path) -> bytes:
    return (wheel / "lib" / "libtorch_npu.so").read_bytes()


@pytest.fixture(scope="module")
def imported(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a child process sees after importing the wheel beside an empty driver."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("gcc or nm is missing, so no stand-in for the driver can be made")
    folder = tmp_path_factory.mktemp("driver")
    source = "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(missing_symbols(wheel)))
    (folder / "driver.c").write_text(source, encoding="utf-8")
    command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o"]
    subprocess.run([*command, str(folder / f"{DRIVER[0]}.so"), str(folder / "driver.c")], check=True)
    for name in DRIVER[1:]:
        shutil.copy(folder / f"{DRIVER[0]}.so", folder / f"{name}.so")
    code = (
        "import json, os, sys, torch, torch_npu, torch.distributed as dist\n"
        "schemas = torch._C._dispatch_get_all_op_names()\n"
        "print('seen ' + json.dumps({'npu': dir(torch.npu), 'torch_npu': dir(torch_npu),"
        "'available': torch.npu.is_available(), 'count': torch.npu.device_count(),"
        "'operators': [n for n in schemas if n.startswith('npu::')],"
        "'collectives': dist.get_default_backend_for_device('npu'),"
        "'fused_adamw': torch._C._dispatch_has_kernel_for_dispatch_key('aten::_fused_adamw_', 'PrivateUse1'),"
        "'accelerator': torch._C._get_privateuse1_backend_name()}), flush=True)\n"
        "os._exit(0)\n"
    )
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": str(wheel.parent),
        "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    found = re.search(r"^seen (.+)$", done.stdout, re.MULTILINE)
    if not found:
        pytest.skip(f"this wheel does not import beside torch {metadata.version('torch')}: {done.stderr[-300:]}")
    seen: dict[str, object] = json.loads(found.group(1))
    return seen


def missing_symbols(wheel: Path) -> set[str]:
    """C symbols that the wheel takes from the driver: those that neither it, nor torch, nor a versioned system library
    defines."""
    import torch

    ours = [*wheel.glob("*.so"), *wheel.glob("lib/*.so")]
    torchs = [*(Path(torch.__file__).parent / "lib").glob("*.so*")]
    wanted = set().union(*(symbols(path, "--undefined-only") for path in ours))
    known = set().union(*(symbols(path, "--defined-only") for path in [*ours, *torchs]))
    return {
        name for name in wanted - known if re.fullmatch(r"(acl|Hccl|hccl|Msprof|msprof|rt|ge|tdt|Prof|prof)\w+", name)
    }


def symbols(path: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=False).stdout
    return {line.split()[-1] for line in listed.splitlines() if "@" not in line and line.split()[-1][:2] != "_Z"}


def test_the_plug_in_is_what_we_say(wheel: Path, imported: dict[str, object]) -> None:
    assert FACTS.plug_in is not None and FACTS.plug_in.autoload
    points = metadata.distribution(FACTS.plug_in.distribution).entry_points
    assert [point.value for point in points if point.group == "torch.backends"] == ["torch_npu:_autoload"]
    assert imported["accelerator"] == FACTS.device_type
    assert imported["collectives"] == FACTS.collectives.backend
    assert imported["available"] is False and imported["count"] == 0


@pytest.mark.parametrize("name", CALLED)
def test_the_device_module_has_what_we_call(imported: dict[str, object], name: str) -> None:
    assert name in imported["npu"]  # type: ignore[operator]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_that_we_call_exist(imported: dict[str, object], name: str) -> None:
    assert name in imported["torch_npu"] or f"npu::{name}" in imported["operators"]  # type: ignore[operator]


def test_adamw_has_a_fused_kernel_of_the_vendor(imported: dict[str, object]) -> None:
    assert imported["fused_adamw"] is True


@pytest.mark.parametrize("name", sorted({v.name for v in (*FACTS.settings, *FACTS.timeouts)} | {FACTS.visible_devices}))
def test_the_variables_that_we_set_are_read(wheel: Path, library: bytes, name: str) -> None:
    sources = (path.read_text(encoding="utf-8", errors="replace") for path in wheel.rglob("*.py"))
    assert name.encode() in library or any(name in source for source in sources)


TEXTS = (
    "HBM MULTI BIT ECC ERROR", "UCE ERROR", "SUSPECT MEM ERROR", "HCCS LINK ERROR", "UB LINK ERROR",
    "HCCL OP RETRY FAILED", "SUSPECT REMOTE ERROR", "FORCE STOP",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_error_texts_are_the_wheels_own(library: bytes, text: str) -> None:
    assert text.encode() in library
    assert FACTS.explain_error(f"[ERROR] {text}. (function call)") is not None


CODES = {
    507010: "ts lost heartbeat", 507013: "sys dma error", 507014: "aicore timeout", 507015: "aicore exception",
    507018: "aicpu exception", 507033: "device setup error", 507034: "vector core timeout",
    507035: "vector core exception", 507899: "drv internal error", 207001: "memory allocation error",
    207003: "aicore over flow", 207018: "device oom",
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_error_codes_mean_what_the_wheels_header_says(wheel: Path, code: int) -> None:
    header = (wheel / "include" / "acl" / "error_codes" / "rt_error_codes.h").read_text(encoding="utf-8")
    assert re.search(rf"\b{code}\b\s*//\s*{CODES[code]}", header)
    assert FACTS.explain_error(f"error code is {code}") is not None
