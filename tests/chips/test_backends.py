"""What every backend states, how the right one is found, and that a missing device is never a silent CPU run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anychip.chips.accelerator import AcceleratorBackend
from anychip.chips.backend import detect_backend
from anychip.chips.catalog import load_catalog
from anychip.chips.cpu import CpuBackend
from anychip.chips.detect import BUILT_IN, Evidence, decide, known_backends, load_backend
from anychip.chips.facts import REDUCE_OPS, Collectives, Setting, VendorFacts, collective_timeouts
from anychip.errors import InputError

VENDORS = [name for name in BUILT_IN if name != "emulated"]
FACTS = [load_backend(name).facts for name in VENDORS]


@pytest.mark.parametrize("name", VENDORS)
def test_a_backend_states_everything_a_launcher_needs(name: str) -> None:
    backend = load_backend(name)
    facts = backend.facts
    assert backend.vendor == facts.vendor == name
    assert backend.collective_backend == facts.collectives.backend
    assert {chip.torch_device_type for chip in load_catalog().values() if chip.vendor == name} == {facts.device_type}
    limits = facts.collectives
    assert {*limits.refused_ops, *limits.emulated_ops} <= set(REDUCE_OPS)
    assert all(hasattr(torch, dtype) for dtype in (*limits.refused_dtypes, *limits.altered_dtypes))
    for op in ("SUM", "MAX"):
        for dtype in ("float32", "bfloat16", "int32", "int64"):
            assert limits.reduces(op, dtype), "what the package itself uses"
    if name != "cpu":
        assert facts.maker and facts.visible_devices and facts.tools and facts.health
        assert facts.health.command[0] in facts.tools
    for setting in facts.settings:
        assert setting.name.isupper() and setting.value and setting.why.endswith(".")


def test_backends_load_without_torch() -> None:
    code = (
        "import sys; from anychip.chips.detect import *;"
        "[load_backend(n).environment(8192) for n in BUILT_IN if n != 'emulated']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.integers(1, 100_000))
def test_inner_timeouts_fire_before_outer_ones(world_size: int) -> None:
    seconds = collective_timeouts(world_size)
    assert seconds.connect >= 300
    assert seconds.execute < seconds.event < seconds.group
    assert seconds.connect < seconds.group
    assert collective_timeouts(world_size + 512).connect > seconds.connect


def test_an_environment_grows_with_the_job_and_follows_the_purpose() -> None:
    ascend = load_backend("ascend")
    small, large = (
        {s.name: s.value for s in ascend.environment(world_size)} for world_size in (8, 8192)
    )  # fmt: skip
    assert int(large["HCCL_CONNECT_TIMEOUT"]) > int(small["HCCL_CONNECT_TIMEOUT"]) >= 300
    assert int(small["HCCL_EVENT_TIMEOUT"]) > int(small["HCCL_EXEC_TIMEOUT"])
    assert small["INF_NAN_MODE_ENABLE"] == "1" and "HCCL_DETERMINISTIC" not in small
    assert [s.name for s in ascend.environment(8, "deterministic")] == ["HCCL_DETERMINISTIC"]
    assert [s.name for s in ascend.environment(8, "canary")] == ["TORCH_NPU_FALLBACK_CPU_DISABLE"]
    assert ascend.collective_timeout(8).total_seconds() == collective_timeouts(8).group


@pytest.mark.parametrize(
    ("vendor", "text", "meaning", "broken"),
    [
        ("ascend", "NPU function error, error code is 507013", "hardware error", True),
        ("ascend", "[Error]: HBM MULTI BIT ECC ERROR.", "memory of the device is damaged", True),
        ("ascend", "HCCS LINK ERROR on device 3", "link inside the node", True),
        ("ascend", "error code is 507015: aicore exception", "operator raised an exception", False),
        ("ascend", "FORCE STOP", "stopped from outside", False),
        ("ascend", "[ERROR] ERR04008 wait for compute device to finish failed", "says nothing by itself", False),
        ("ascend", "EI0002: the wait execution of the Notify register times out", "another rank", False),
        ("ascend", "code 1507013999", None, False),
        ("mthreads", "MUSA_ERROR_MTLINK_UNCORRECTABLE", "link inside the node", True),
        ("nvidia", "CUDA error: uncorrectable ECC error encountered", "memory of the device", True),
        ("amd", "HIP error: an illegal memory access was encountered", "left its memory", False),
        ("cpu", "RuntimeError: [enforce fail] out of memory", "not enough memory", False),
        ("cambricon", "Connection reset by peer", "another process", False),
        ("hygon", "everything is fine", None, False),
    ],
)
def test_errors_are_explained(vendor: str, text: str, meaning: str | None, broken: bool) -> None:
    found = load_backend(vendor).explain_error(text)
    if meaning is None:
        assert found is None
    else:
        assert found is not None and meaning in found.meaning
        assert found.broken_hardware is broken and found.do


def test_limits_of_collectives() -> None:
    hccl, cncl = load_backend("ascend").facts.collectives, load_backend("cambricon").facts.collectives
    assert not hccl.reduces("AVG", "float32") and not hccl.reduces("SUM", "float64") and not hccl.reduces("SUM", "bool")
    assert "AVG" in cncl.refused_ops and cncl.altered_dtypes["float64"] == "sent as float32"


# Detection


@pytest.mark.parametrize(
    ("seen", "vendor"),
    [
        (Evidence(), "cpu"),
        (Evidence(device_type="npu", device_names=("Ascend910B3",), plug_ins=("torch_npu",)), "ascend"),
        (Evidence(device_type="mlu", plug_ins=("torch_mlu",)), "cambricon"),
        (Evidence(device_type="musa", device_names=("MTT S4000",)), "mthreads"),
        (Evidence(device_type="gcu", device_names=("S60",)), "enflame"),
        (Evidence(device_type="cuda", device_names=("NVIDIA H100 80GB HBM3",), tools=("nvidia-smi",)), "nvidia"),
        (Evidence(device_type="cuda", device_names=("MetaX C500",)), "metax"),
        (Evidence(device_type="cuda", device_names=("MXC500",)), "metax"),
        (Evidence(device_type="cuda", device_names=("Iluvatar BI-V150",)), "iluvatar"),
        (Evidence(device_type="cuda", device_names=("device",), tools=("ixsmi",)), "iluvatar"),
        (Evidence(device_type="cuda", device_names=("P800",)), "kunlunxin"),
        (Evidence(device_type="cuda", device_names=("device",), tools=("xpu-smi",)), "kunlunxin"),
        (Evidence(device_type="cuda", device_names=("device",), tools=("xpu-smi", "nvidia-smi")), "nvidia"),
        (Evidence(device_type="cuda", device_names=("NVIDIA A100",), markers=("XPU",)), "kunlunxin"),
        (Evidence(device_type="cuda", device_names=("device",)), "nvidia"),
        (Evidence(device_type="cuda", hip="6.3", device_names=("AMD Instinct MI300X",)), "amd"),
        (Evidence(device_type="cuda", hip="5.7", device_names=("K100_AI",)), "hygon"),
        (Evidence(device_type="cuda", hip="5.7", device_names=("device",), tools=("hy-smi",)), "hygon"),
        (Evidence(device_type="cuda", hip="6.3", device_names=("device",)), "amd"),
        (Evidence(device_type="mps"), "cpu"),
        (Evidence(built_for="12.8"), "cpu"),
        (Evidence(tools=("nvidia-smi",)), "cpu"),
        (Evidence(built_for="12.8", tools=("nvidia-smi",), hidden=("CUDA_VISIBLE_DEVICES",)), "cpu"),
    ],
)
def test_the_vendor_follows_from_what_is_seen(seen: Evidence, vendor: str) -> None:
    assert decide(seen, FACTS) == vendor


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (Evidence(plug_ins=("torch_npu",)), "torch_npu is installed for Huawei Ascend, but it sees no device"),
        (
            Evidence(plug_ins=("torch_mlu",), failures={"torch_mlu": "its import fails (libcnrt.so)"}),
            "torch_mlu is installed for Cambricon, but its import fails",
        ),
        (Evidence(built_for="12.8", tools=("nvidia-smi",)), "torch is installed for NVIDIA, but it sees no device"),
        (Evidence(built_for="6.3", hip="6.3", tools=("amd-smi",)), "torch is installed for AMD, but it sees no device"),
        (Evidence(device_type="hpu"), "accelerator of type 'hpu', which no backend drives"),
    ],
)
def test_a_missing_device_is_not_a_cpu_run(seen: Evidence, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        decide(seen, FACTS)
    assert "ANYCHIP_CHIP=cpu" in raised.value.paragraph


def test_the_environment_chooses_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "ascend")
    assert detect_backend().vendor == "ascend"
    monkeypatch.setenv("ANYCHIP_CHIP", "ascent")
    with pytest.raises(InputError, match=r"no backend 'ascent'.*Known: ascend, cambricon"):
        detect_backend()
    monkeypatch.delenv("ANYCHIP_CHIP")
    if not torch.accelerator.is_available():
        assert detect_backend().vendor == "cpu"


def test_renaming_apis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_TRANSFER_TO_NPU", "1")
    with pytest.raises(InputError, match=r"TORCH_TRANSFER_TO_NPU.*Unset it"):
        detect_backend()
    monkeypatch.setenv("TORCH_TRANSFER_TO_NPU", "0")
    monkeypatch.setenv("ANYCHIP_CHIP", "cpu")
    assert detect_backend().vendor == "cpu"


def test_a_plug_in_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"chip cambricon: torch_mlu is not installed\. Get it: "):
        load_backend("cambricon").device(0)


# The generic accelerator, tried on the one device every machine has


class Generic(AcceleratorBackend):
    facts = VendorFacts(
        "generic",
        "cpu",
        Collectives("gloo"),
        visible_devices="GENERIC_VISIBLE",
        settings=(Setting("GENERIC_RUN", "1", "x"), Setting("GENERIC_DETERMINISTIC", "1", "x", "deterministic")),
    )


def test_a_process_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cpu, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cpu, "set_device", chosen.append)
    assert Generic().device(2) == torch.device("cpu", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Generic().device() == torch.device("cpu", 3)
    assert chosen == [2, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("GENERIC_VISIBLE", "0,1,2,3")
    with pytest.raises(
        InputError, match=r"process 4 .* needs device cpu:4, but 4 are visible\. GENERIC_VISIBLE is '0,1"
    ):
        Generic().device()


def test_memory_is_asked_of_the_device_module_where_torch_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here() -> int:
        raise RuntimeError("Allocator for x is not a DeviceAllocator")

    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.accelerator, name, not_here)
    assert Generic().memory().allocated is None and Generic().peak_memory_bytes() == 0
    monkeypatch.setattr(torch.cpu, "memory_allocated", lambda: 7, raising=False)
    monkeypatch.setattr(torch.cpu, "max_memory_allocated", lambda: 9, raising=False)
    assert Generic().memory().allocated == 7 and Generic().peak_memory_bytes() == 9
    monkeypatch.setattr(torch.cpu, "max_memory_reserved", lambda: 11, raising=False)
    assert Generic().peak_memory_bytes() == 11


def test_waiting_falls_back_to_the_device_module(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: waited.append(True))
    Generic().synchronize()
    assert waited == [True] or torch.accelerator.is_available()


def test_emulated_bf16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Generic().multiplies_bf16()
    monkeypatch.setattr(
        torch.cpu, "is_bf16_supported", lambda including_emulation=True: including_emulation, raising=False
    )
    assert not Generic().multiplies_bf16()
    monkeypatch.setattr(torch.cpu, "is_bf16_supported", lambda: True)
    assert Generic().multiplies_bf16()


def test_variables_are_set_but_never_over_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("GENERIC_RUN", "5")
    monkeypatch.delenv("GENERIC_DETERMINISTIC", raising=False)
    Generic().prepare_process()
    assert os.environ["GENERIC_RUN"] == "5" and "GENERIC_DETERMINISTIC" not in os.environ
    Generic().set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["GENERIC_DETERMINISTIC"] == "1"
    Generic().set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    os.environ.pop("GENERIC_DETERMINISTIC")


def test_the_cpu_is_one_device_for_all_processes() -> None:
    backend = CpuBackend()
    assert backend.device(7) == torch.device("cpu") and backend.device_count() == 1
    assert backend.memory().peak_reserved == backend.peak_memory_bytes() > 10_000_000
    assert replace(backend.facts, vendor="x").explain_error("nothing") is None


def test_known_names_are_complete() -> None:
    assert set(BUILT_IN) <= set(known_backends())
