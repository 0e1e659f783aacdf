"""A recipe trains on the emulated chip as on the CPU, and a run that was killed continues there bit for bit."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from device_process import needs_device
from tiny_run import finish, start, write_tiny_recipe

from anychip.chips.emulated.build import library
from anychip.train.checkpoint import CheckpointStore

pytestmark = needs_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, `prepared`, and the CPU's training of it, `cpu`."""
    library()
    folder = tmp_path_factory.mktemp("emulated")
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    shutil.copytree(folder / "runs", folder / "prepared")
    finish(folder, "train", "tiny.yaml")
    (folder / "runs").rename(folder / "cpu")
    return folder


def _rows(runs: Path) -> list[dict[str, float]]:
    lines = (runs / "tiny/logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _state(runs: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(runs / "tiny/checkpoints")
    newest = store.latest()
    assert newest is not None
    assert newest.step == 12
    return dict(store.read(newest))


@pytest.mark.parametrize("quirks", ["", "worst"])
def test_it_trains_to_the_cpus_losses(
    folder: Path, tmp_path: Path, quirks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "emulated")
    monkeypatch.setenv("ANYCHIP_EMULATED", quirks)
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    finish(folder, "train", "tiny.yaml", "--runs", str(runs))
    expected, found = _rows(folder / "cpu"), _rows(runs)
    assert [row["step"] for row in found] == list(range(1, 13))
    for there, here in zip(found, expected, strict=True):  # the chip's sums are in fp32, the CPU's in fp64
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-6)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-6)
        assert 0 < there["memory_bytes"] < 100_000_000
    weights = _state(folder / "cpu")
    for name, tensor in _state(runs).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-6)


def test_a_killed_run_continues_with_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "emulated")
    monkeypatch.setenv("ANYCHIP_EMULATED", "cpu_watch")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for runs in (whole, killed):
        shutil.copytree(folder / "prepared", runs)
    finish(folder, "train", "tiny.yaml", "--runs", str(whole))
    for steps in (5, 3):
        process = start(folder, "train", "tiny.yaml", "--runs", str(killed))
        assert process.stdout is not None
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(0.02)
        process.kill()
        process.communicate()
    finish(folder, "train", "tiny.yaml", "--runs", str(killed))
    assert [(row["step"], row["loss"]) for row in _rows(killed)] == [(row["step"], row["loss"]) for row in _rows(whole)]
    expected = _state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _state(killed).items())


def test_too_little_memory_is_said_without_a_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "emulated")
    monkeypatch.setenv("ANYCHIP_EMULATED", "memory=10KB")
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    process = start(folder, "train", "tiny.yaml", "--runs", str(runs))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "emulated out of memory" in errors
