"""A backend that is not in our tree: found by its entry point, chosen, examined, trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_tiny_recipe

from anychip.chips.detect import Evidence, decide, load_backend
from anychip.chips.facts import Collectives, PlugIn, VendorFacts

TOY = Path(__file__).with_name("toy_chip.py")


def install(folder: Path, entry: str = "toy = toy_chip:ToyBackend") -> dict[str, str]:
    """What pip leaves behind: the module and its metadata. Returns the environment that sees them."""
    shutil.copy(TOY, folder)
    metadata = folder / "toy_chip-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-chip\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[anychip.chips]\n{entry}\n", encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "ANYCHIP_CHIP": "toy", "OMP_NUM_THREADS": "1"}


def anychip(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anychip", *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )


def test_it_takes_less_than_80_lines() -> None:
    assert len(TOY.read_text(encoding="utf-8").splitlines()) < 80


def test_a_toy_trains_by_its_entry_point(tmp_path: Path) -> None:
    environment = install(tmp_path)
    recipe = write_tiny_recipe(tmp_path, steps=2, eval_interval=0)
    for stage in (("data", "prepare"), ("train",)):
        done = anychip(environment, tmp_path, *stage, str(recipe))
        assert done.returncode == 0, done.stderr[-3000:]
    metrics = (tmp_path / "runs" / "tiny" / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [entry for entry in map(json.loads, metrics.splitlines()) if "memory_bytes" in entry]
    assert len(steps) == 2 and all(entry["memory_bytes"] == 4_321_000_000 for entry in steps), "the toy's own figure"


def test_the_doctor_asks_the_toys_tool(tmp_path: Path) -> None:
    environment = install(tmp_path)
    tool = tmp_path / "toy-smi"
    tool.write_text("#!/bin/sh\necho 0 fine 41C\necho 1 rusty 55C\n", encoding="utf-8")
    tool.chmod(0o755)
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    done = anychip(environment, tmp_path, "doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 3 and report["vendor"] == "toy"
    assert [finding["what"] for finding in report["findings"]] == ["Device 1 is sick: rusty."]
    assert [(v["name"], v["now"]) for v in report["environment"]] == [("TOY_QUEUE", None)]
    tool.write_text("#!/bin/sh\necho 0 fine 41C\n", encoding="utf-8")
    assert anychip({**environment, "TOY_QUEUE": "2"}, tmp_path, "doctor").returncode == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("toy = toy_chip:NoSuchBackend", "chip toy: the backend cannot be loaded (AttributeError"),
        ("toy = no_such_module:ToyBackend", "chip toy: the backend cannot be loaded (ModuleNotFoundError"),
        ("toi = toy_chip:ToyBackend", "ANYCHIP_CHIP: there is no backend 'toy'. Known: toi, ascend"),
    ],
)
def test_a_broken_backend_is_one_clear_paragraph(tmp_path: Path, entry: str, message: str) -> None:
    environment = install(tmp_path, entry)
    code = (
        "from anychip.chips.backend import detect_backend\nfrom anychip.errors import InputError\n"
        "try: detect_backend()\nexcept InputError as error: print(error.paragraph)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert message in done.stdout, done.stderr


def test_a_third_party_is_detected_as_ours_are() -> None:
    theirs = VendorFacts("biren", "supa", Collectives("bccl"), plug_in=PlugIn("torch_br", "torch-br", False, "theirs"))
    ours = [load_backend(name).facts for name in ("ascend", "nvidia")]
    assert decide(Evidence(device_type="supa", plug_ins=("torch_br",)), [theirs, *ours]) == "biren"
