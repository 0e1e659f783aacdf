"""A recipe trains on the emulated chip as on the CPU, and a run that was killed continues there bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from device_process import needs_device
from tiny_run import finish, prepare_and_run, start

from anychip.chips.emulated.build import library
from anychip.train.checkpoint import CheckpointStore

pytestmark = needs_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run, `prepared`, and the CPU's training of it, `cpu`."""
    library()
    folder = prepare_and_run(tmp_path_factory.mktemp("emulated"), "train", "tiny.yaml")
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


@pytest.fixture(scope="module")
def emulated(folder: Path) -> Path:
    """The same training on the emulated chip."""
    shutil.copytree(folder / "prepared", folder / "emulated")
    with pytest.MonkeyPatch.context() as patch:
        _on_emulated_chip(patch, "cpu_watch")
        finish(folder, "train", "tiny.yaml", "--runs", str(folder / "emulated"))
    return folder / "emulated"


def _on_emulated_chip(patch: pytest.MonkeyPatch, quirks: str) -> None:
    patch.setenv("ANYCHIP_CHIP", "emulated")
    patch.setenv("ANYCHIP_EMULATED", quirks)


def _assert_trained_as_on_the_cpu(runs: Path, cpu: Path) -> None:
    expected, found = _rows(cpu), _rows(runs)
    assert [row["step"] for row in found] == list(range(1, 13))
    for there, here in zip(found, expected, strict=True):  # the chip's sums are in fp32, the CPU's in fp64
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-6)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-6)
        assert 0 < there["memory_bytes"] < 100_000_000
    weights = _state(cpu)
    for name, tensor in _state(runs).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-6)


def test_it_trains_to_the_cpus_losses(folder: Path, emulated: Path) -> None:
    _assert_trained_as_on_the_cpu(emulated, folder / "cpu")


def test_it_does_so_with_every_quirk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_emulated_chip(monkeypatch, "worst")
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    finish(folder, "train", "tiny.yaml", "--runs", str(runs))
    _assert_trained_as_on_the_cpu(runs, folder / "cpu")


def test_a_killed_run_continues_with_the_same_bits(
    folder: Path, emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_emulated_chip(monkeypatch, "cpu_watch")
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    process = start(folder, "train", "tiny.yaml", "--runs", str(runs))
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 5/"):
        assert process.poll() is None
    process.kill()
    process.communicate()
    newest = CheckpointStore(runs / "tiny/checkpoints").latest()
    assert newest is not None
    assert newest.step < 12
    finish(folder, "train", "tiny.yaml", "--runs", str(runs))
    assert [(row["step"], row["loss"]) for row in _rows(runs)] == [
        (row["step"], row["loss"]) for row in _rows(emulated)
    ]
    expected = _state(emulated)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _state(runs).items())


def test_too_little_memory_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_emulated_chip(monkeypatch, "memory=10KB")
    runs = tmp_path / "runs"
    shutil.copytree(folder / "prepared", runs)
    process = start(folder, "train", "tiny.yaml", "--runs", str(runs))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "emulated out of memory" in errors
