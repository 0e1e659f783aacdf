"""The command line: fast help, plain errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest


def anychip(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anychip", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    probe = "import sys; from anychip import cli; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "pydantic", "datatrove", "tokenizers", "matplotlib"):
        assert f"'{heavy}'" not in loaded
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert anychip("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("verb", ["run", "train", "sft", "eval", "init", "report"])
def test_a_missing_recipe_is_one_paragraph_and_exit_code_2(verb: str, tmp_path: Path) -> None:
    result = anychip(verb, "nothing.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "nothing.yaml" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
