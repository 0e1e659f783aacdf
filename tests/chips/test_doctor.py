"""What the doctor says of machines that are not this one: broken plug-ins, versions that do not fit, idle chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anychip.chips.doctor import Report, _judge_plug_in, examine, matching_torch
from anychip.chips.facts import PlugIn
from anychip.chips.listing import chips_as_text


def doctor(folder: Path, **variables: str) -> tuple[int, dict[str, object], str]:
    """Exit code, report and text of all findings, with `folder` first on sys.path and on PATH."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", "anychip", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    return done.returncode, report, " ".join(f"{f['what']} {f['do']}" for f in report["findings"])


def install_plug_in(
    folder: Path, module: str, distribution: str, version: str, code: str, autoload: bool = True
) -> None:
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", "utf-8")
    if autoload:
        (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{module} = {module}:_autoload\n", "utf-8")


def install_tool(folder: Path, name: str, output: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_healthy_cpu_is_fit(tmp_path: Path) -> None:
    code, report, text = doctor(tmp_path, ANYCHIP_CHIP="cpu")
    assert code == 0 and report["fit"] and report["vendor"] == "cpu" and not text
    versions = report["versions"]
    assert isinstance(versions, dict) and versions["torch"] and versions["python"]


def test_a_plug_in_that_breaks_import_torch_is_named_once_with_the_fix(tmp_path: Path) -> None:
    broken = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
    install_plug_in(tmp_path, "torch_npu", "torch-npu", "2.13.0", broken)
    code, report, text = doctor(tmp_path)
    assert code == 3
    assert "`import torch` fails" in text and "torch_npu" in text and "libhccl.so" in text
    assert "set_env.sh" in text and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text
    findings = report["findings"]
    assert isinstance(findings, list) and len(findings) == 1


def test_a_plug_in_of_another_release_is_a_fault(tmp_path: Path) -> None:
    install_plug_in(tmp_path, "torch_npu", "torch-npu", "2.1.0.post12", "def _autoload(): pass\n")
    code, _, text = doctor(tmp_path)
    assert code == 3
    assert f"torch_npu 2.1.0.post12 is made for torch 2.1, but torch {torch.__version__} is here" in text
    assert "torch_npu is installed for Huawei Ascend, but it sees no device" in text


def test_a_plug_in_without_autoload_is_tried_too(tmp_path: Path) -> None:
    install_plug_in(tmp_path, "torch_mlu", "torch-mlu", "1.22.0", "raise OSError('libcnrt.so')\n", autoload=False)
    code, _, text = doctor(tmp_path)
    assert code == 3 and "The plug-in torch_mlu does not work" in text and "NEUWARE_HOME" in text


def test_an_idle_chip_is_noticed_unless_the_cpu_is_meant(tmp_path: Path) -> None:
    install_tool(tmp_path, "npu-smi")
    code, _, text = doctor(tmp_path)
    assert code == 3 and "npu-smi is here, so this machine may have a Huawei Ascend chip" in text
    assert "ANYCHIP_CHIP=cpu" in text
    assert doctor(tmp_path, ANYCHIP_CHIP="cpu")[0] == 0


def test_a_chosen_chip_without_its_plug_in_says_where_to_get_it(tmp_path: Path) -> None:
    code, report, text = doctor(tmp_path, ANYCHIP_CHIP="cambricon")
    assert code == 3 and report["vendor"] == "cambricon"
    assert "torch_mlu is not installed." in text and "the vendor's wheels" in text


def test_unknown_names_and_renamed_apis_are_faults(tmp_path: Path) -> None:
    code, _, text = doctor(tmp_path, ANYCHIP_CHIP="ascent")
    assert code == 3 and "no backend 'ascent'" in text
    code, _, text = doctor(tmp_path, TORCH_TRANSFER_TO_NPU="1")
    assert code == 3 and "Unset it" in text


@pytest.mark.parametrize(
    ("version", "release"), [("2.13.0.post2", "2.13"), ("1.22.0+torch2.4.0", "2.4"), ("2.7.1", "2.7")]
)
def test_which_torch_a_plug_in_is_made_for(version: str, release: str) -> None:
    assert matching_torch(version) == release


def test_versions_that_fit_are_no_finding() -> None:
    plug_in = PlugIn("torch_x", "torch-x", True, "there")
    for theirs, ours, faults in (
        ("2.13.0.post1", "2.13.0+cpu", 0),
        ("1.2+torch2.13.1", "2.13.0", 0),
        ("2.12.0", "2.13.0", 1),
    ):
        report = Report(versions={"torch_x": theirs, "torch": ours})
        _judge_plug_in(report, plug_in, ours)
        assert len(report.findings) == faults


def test_the_table_marks_what_nobody_read_again() -> None:
    text = chips_as_text()
    row = next(line.split() for line in text.splitlines() if line.startswith("h100-sxm"))
    assert row[3:5] == ["989~", "989~"] and "-" in row
    assert next(line for line in text.splitlines() if line.startswith("mlu590")).split()[3:7] == ["-"] * 4
    assert "~: from memory" in text and "Detected here" in text


def test_a_report_of_this_machine_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "cpu")
    text = examine().as_text()
    assert "torch " in text and text.endswith("Fit to train.")


def test_other_verbs_point_to_the_doctor_when_torch_cannot_start(tmp_path: Path) -> None:
    install_plug_in(tmp_path, "torch_npu", "torch-npu", "2.13.0", "raise ImportError('libhccl.so')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "anychip", "bench", "chip"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "torch_npu" in done.stderr and "anychip doctor" in done.stderr
