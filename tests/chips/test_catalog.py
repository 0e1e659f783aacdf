"""The catalogue agrees with itself, and never lets a remembered or reported figure pass for an official one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from anychip.chips.catalog import Chip, find_chip, load_catalog, recognize_chip
from anychip.chips.catalog.load import FOLDER
from anychip.errors import InputError

CATALOG = load_catalog()


def test_every_vendor_file_is_there() -> None:
    assert len(CATALOG) >= 53
    assert {chip.vendor for chip in CATALOG.values()} == {path.stem for path in FOLDER.glob("*.yaml")}
    assert not CATALOG["cpu-generic"].figures


@pytest.mark.parametrize("chip", CATALOG.values(), ids=lambda chip: chip.id)
def test_a_chip_reads_as_its_file_says(chip: Chip) -> None:
    """The raw file, read without our schema, holds the same numbers."""
    raw = yaml.safe_load((FOLDER / f"{chip.vendor}.yaml").read_text(encoding="utf-8"))
    entry = next(entry for entry in raw["chips"] if entry["id"] == chip.id)
    for name, figure in chip.figures.items():
        field, _, dtype = name.partition(".")
        written = entry[field][dtype] if dtype else entry[field]
        assert figure.value == (written["value"] if isinstance(written, dict) else written)
        assert figure.source == (written if isinstance(written, dict) else entry)["source"]
        assert figure.confidence == (written if isinstance(written, dict) else entry)["confidence"]


def test_a_figure_says_where_it_comes_from() -> None:
    for chip in CATALOG.values():
        for name, figure in chip.figures.items():
            assert figure.source.strip(), (chip.id, name)
            plainly_official = figure.standing == "official"
            assert not (plainly_official and ("memory" in figure.source or "press" in figure.source)), (chip.id, name)
            assert not (figure.confidence == "press" and "datasheet" in figure.source), (chip.id, name)
            assert not name.startswith("measured_tflops") or figure.confidence == "measured", (chip.id, name)


def test_a_remembered_official_figure_does_not_present_itself_as_official() -> None:
    figure = CATALOG["h100-sxm"].peak_tflops["bf16"]
    assert figure.confidence == "official" and figure.from_memory
    assert figure.standing == "official, from memory"


def test_disputed_peaks_stay_unknown() -> None:
    for identifier in ("mlu590", "mlu690", "metax-c550", "iluvatar-bi-v150", "biren-br106", "dcu-k100"):
        assert not CATALOG[identifier].peak_tflops, identifier


@pytest.mark.parametrize("die", [chip for chip in CATALOG.values() if chip.package], ids=lambda chip: chip.id)
def test_dies_are_shares_of_their_package(die: Chip) -> None:
    package = find_chip(die.package or "")
    assert package.dies and package.vendor == die.vendor
    for name, figure in die.figures.items():
        assert figure.value * package.dies == pytest.approx(package.figures[name].value), name
        assert figure.confidence in ("derived", "press")
    for name in ("devices_per_node", "supernode_devices"):
        whole, part = getattr(package, name), getattr(die, name)
        assert (whole is None) == (part is None) and (whole is None or part == whole * package.dies)


def test_a_chip_of_several_sizes_is_at_least_as_fast_in_narrower_types() -> None:
    for chip in CATALOG.values():
        narrowest = "fp8" if "fp8" in chip.peak_tflops else "int8"  # the newest gave most int8 units up
        types = ("fp32", "tf32", "bf16", narrowest)
        rates = [chip.peak_tflops[dtype].value for dtype in types if dtype in chip.peak_tflops]
        assert rates == sorted(rates), chip.id


def test_a_super_node_holds_whole_nodes() -> None:
    for chip in CATALOG.values():
        if chip.supernode_devices and chip.devices_per_node:
            assert chip.supernode_devices % chip.devices_per_node == 0, chip.id


def test_an_unknown_chip_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean ascend-910b3"):
        find_chip("Ascend910B3")
    with pytest.raises(InputError, match="anychip chips"):
        find_chip("zzz")


@pytest.mark.parametrize(
    ("vendor", "name", "chip"),
    [
        ("ascend", "Ascend910B3", "ascend-910b3"),
        ("ascend", "Ascend910_9391", "ascend-910c-die"),
        ("ascend", "Ascend910B2C", None),
        ("nvidia", "NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("nvidia", "NVIDIA H100 PCIe", None),
        ("nvidia", "NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("nvidia", "NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("nvidia", "NVIDIA H200", "h200-sxm"),
        ("nvidia", "NVIDIA B200", "b200-sxm"),
        ("nvidia", "NVIDIA GB200", "gb200"),
        ("nvidia", "NVIDIA B300 SXM6 AC", "b300-sxm"),
        ("nvidia", "NVIDIA GB300", "gb300"),
        ("metax", "MetaX C500", "metax-c500"),
        ("hygon", "K100_AI", "dcu-k100-ai"),
        ("mthreads", "Ascend910B3", None),
    ],
)
def test_a_chip_is_recognized_by_its_name_in_torch(vendor: str, name: str, chip: str | None) -> None:
    found = recognize_chip(vendor, name)
    assert (found.id if found else None) == chip


GOOD = "vendor: x\nmaker: X\ntorch_device_type: x\nchips:\n- {id: x1, name: X1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chips: [", "cannot be read as YAML"),
        ("vendor: x", "has no list of chips"),
        ("[1, 2]", "has no list of chips"),
        (GOOD + ", memory: 3}", r"chip x1: memory is not a field of a chip; did you mean memory_gb"),
        (GOOD + ", memory_gb: 3}", r"chip x1: memory_gb.source is missing"),
        (GOOD + ", memory_gb: 3, source: s, confidence: sure}", r"memory_gb.confidence is 'sure'; allowed: 'official'"),
        (GOOD + ", memory_gb: -3, source: s, confidence: press}", r"memory_gb.value is -3"),
        (GOOD + ", memory_gb: .nan, source: s, confidence: press}", r"memory_gb.value is nan"),
        (GOOD + ", memory_gb: true, source: s, confidence: press}", r"memory_gb"),
        (GOOD + ", peak_tflops: {fp4: 3}, source: s, confidence: press}", r"peak_tflops.fp4"),
        (GOOD + ", dies: 2, package: y}", r"cannot be both"),
        (GOOD + ", package: y}", r"package y is not a chip with dies"),
        (GOOD + "}\n- {id: x1, name: again}", r"chip x1 is in the catalogue twice"),
        (GOOD + "}\n- {name: nameless}", r"chip \(without id\): id is missing"),
    ],
)
def test_a_wrong_file_is_named_with_its_chip_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        load_catalog(tmp_path)
    assert str(tmp_path) in raised.value.paragraph


def test_it_loads_fast_and_without_torch() -> None:
    """Importing and reading; the planner's second must not be spent here."""
    code = (
        "import sys, time, anychip.recipe; started = time.perf_counter();"
        "from anychip.chips.catalog import load_catalog; load_catalog();"
        "seconds = time.perf_counter() - started; assert 'torch' not in sys.modules; print(seconds)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5  # 0.05 on an idle machine; tests share theirs
