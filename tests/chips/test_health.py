"""Vendors' tools are read as they print, and whatever else they print is survived."""

from __future__ import annotations

import math
import re

import pytest
from health_samples import NPU_SMI_DIES, SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.chips.ascend import parse_npu_smi
from anychip.chips.detect import load_backend
from anychip.chips.facts import DeviceHealth, HealthCommand


def tool(vendor: str) -> HealthCommand:
    health = load_backend(vendor).facts.health
    assert health is not None
    return health


EXPECTED = {
    "ascend": DeviceHealth("0/0", "910B3", True, (), 48, 93.5, 3393, 65536),
    "cambricon": DeviceHealth("0", "MLU370-X8", True, (), 41, 72, 1021, 24576),
    "mthreads": DeviceHealth("0", "MTT S4000", True, (), 44, 98.11, 512, 49152),
    "enflame": DeviceHealth("0", "S60", True, (), 34, 65.5, 1129, 42976),
    "hygon": DeviceHealth("0", "BW", None, (), 57, 91, 64169, 65520),
    "metax": DeviceHealth("0", "MetaX C500", None, (), 36, 69, 858, 65536),
    "iluvatar": DeviceHealth("0", "Iluvatar BI-V150", None, (), 46, None, 257, 32768),
    "kunlunxin": DeviceHealth("0", "P800 OAM", None, (), 40, 80, 1000, 98304),
    "nvidia": DeviceHealth("0", "NVIDIA H100 80GB HBM3", True, (), 34, 71.2, 4, 81559),
    "amd": DeviceHealth("0", "", True, (), 41, 138, 283, 196592),
}


@pytest.mark.parametrize("vendor", SAMPLES)
def test_the_first_device_of_a_sample(vendor: str) -> None:
    assert tool(vendor).parse(SAMPLES[vendor])[0] == EXPECTED[vendor]


@pytest.mark.parametrize(
    ("vendor", "problem"),
    [
        ("ascend", "health is Alarm"),
        ("cambricon", "uncorrectable errors: 3"),
        ("mthreads", "DRAM Uncorrectable: 2"),
        ("enflame", "health is False"),
        ("nvidia", "2 uncorrected ECC errors"),
        ("amd", "7 uncorrectable ECC errors"),
    ],
)
def test_a_sick_device_is_found(vendor: str, problem: str) -> None:
    sick = [device for device in tool(vendor).parse(SAMPLES[vendor]) if device.healthy is False]
    assert [device.device.split("/")[0] for device in sick] == ["1"]
    assert problem in sick[0].problems[0]


def test_silence_about_health_is_not_health() -> None:
    for vendor in ("hygon", "metax", "iluvatar", "kunlunxin"):
        devices = tool(vendor).parse(SAMPLES[vendor])
        assert len(devices) == 2 and all(device.healthy is None for device in devices)
    assert tool("nvidia").parse(SAMPLES["nvidia"])[2].healthy is None  # no ECC memory


def test_both_dies_of_a_package_are_read() -> None:
    first, second = parse_npu_smi(NPU_SMI_DIES)
    assert (first.device, second.device) == ("3/0", "3/1")
    assert (first.power_watts, second.power_watts) == (178.5, None)
    assert second.memory_used_mib == 3195


@pytest.mark.parametrize(
    ("vendor", "version"),
    [("ascend", "24.1.rc2"), ("cambricon", "5.10.22"), ("mthreads", "2.7.0"), ("enflame", "1.2.4.12"),
     ("metax", "2.12.13"), ("iluvatar", "4.3.0"), ("nvidia", "550.54.15")],
)  # fmt: skip
def test_the_driver_version_is_read(vendor: str, version: str) -> None:
    found = re.search(tool(vendor).version, SAMPLES[vendor], re.MULTILINE | re.IGNORECASE)
    assert found and found.group(1) == version


def check(devices: list[DeviceHealth]) -> None:
    for device in devices:
        assert (device.healthy is False) == bool(device.problems)
        for value in (device.temperature_c, device.power_watts, device.memory_used_mib, device.memory_total_mib):
            assert value is None or math.isfinite(value)


KEYS = [
    "GPU", "gpu_data", "gpu", "ecc", "power", "ECC Errors", "Temperature", "total_uncorrectable_count",
    "Attached GPUs", "FB Memory Usage", "value", "Index",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("vendor", SAMPLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_output_breaks_a_parser(vendor: str, data: st.DataObject) -> None:
    """Arbitrary text, a sample with pieces cut out or replaced, and JSON of unexpected shapes."""
    import json

    sample = SAMPLES[vendor]
    start = data.draw(st.integers(0, len(sample)))
    stop = data.draw(st.integers(start, min(len(sample), start + 60)))
    torn = sample[:start] + data.draw(st.text(max_size=20)) + sample[stop:]
    for text in (torn, data.draw(st.text()), json.dumps(data.draw(JSON))):
        check(tool(vendor).parse(text))


@pytest.mark.parametrize("vendor", SAMPLES)
def test_truncated_output_gives_only_whole_devices(vendor: str) -> None:
    sample = SAMPLES[vendor]
    whole = len(tool(vendor).parse(sample))
    assert whole >= 2
    for cut in range(0, len(sample), 37):
        assert len(tool(vendor).parse(sample[:cut])) <= whole
