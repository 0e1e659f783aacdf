"""`anychip verify`: two machines that never meet are compared by two files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import finish, start, write_tiny_recipe

from anychip.chips.compiling import find_compiler
from anychip.chips.emulated.build import library
from anychip.chips.emulated.faults.catalogue import VARIABLE

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="the emulated device needs a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, `prepared`, and the CPU's trace of it."""
    library()
    folder = tmp_path_factory.mktemp("traced")
    write_tiny_recipe(folder, eval_interval=0, steps=6)
    finish(folder, "data", "prepare", "tiny.yaml")
    (folder / "runs").rename(folder / "prepared")
    trace(folder, "cpu")
    return folder


def trace(folder: Path, runs: str) -> Path:
    shutil.copytree(folder / "prepared", folder / runs)
    finish(folder, "verify", "trace", "tiny.yaml", "--interval", "3", "--runs", runs)
    return folder / runs / "tiny/trace.jsonl"


def compare(folder: Path, other: Path) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was found."""
    process = start(folder, "verify", "compare", "cpu/tiny/trace.jsonl", str(other), "--json")
    said, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 3), errors
    return process.returncode, json.loads(said)


def test_another_chip_differs_by_rounding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "emulated")
    code, found = compare(folder, trace(folder, "emulated"))
    assert (code, found["outcome"], found["steps"]) == (0, "rounding", [1, 3, 6])


def test_a_chip_that_computes_wrong_is_told_by_layer_and_direction(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "emulated")
    monkeypatch.setenv(VARIABLE, "silu.backward")
    code, found = compare(folder, trace(folder, "faulty"))
    assert (code, found["outcome"]) == (3, "bug")
    departure = found["departure"]
    assert (departure["direction"], departure["name"]) == ("backward", "layers.1.mlp.gate_proj")
    assert departure["after"] == "layers.1.mlp.up_proj.weight"


@pytest.mark.slow
def test_two_processes_leave_the_trace_of_one(folder: Path) -> None:
    shutil.copytree(folder / "prepared", folder / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "anychip"]
    options = ["--interval", "3", "--runs", "two", "--set", "parallel.data_parallel_shard=2"]
    subprocess.run([*command, "verify", "trace", "tiny.yaml", *options], cwd=folder, check=True, timeout=200)
    code, found = compare(folder, folder / "two/tiny/trace.jsonl")
    assert (code, found["outcome"], found["only_in_one"]) == (0, "rounding", [])


def test_a_trained_run_is_not_traced(folder: Path) -> None:
    process = start(folder, "verify", "trace", "tiny.yaml", "--runs", "cpu")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "first step" in errors
