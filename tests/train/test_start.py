"""What a process does before its first step is done again after every fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_run import finish, write_tiny_recipe

_TRAIN = """
import runpy, sys
sys.argv = ["anychip", "train", "tiny.yaml", "--set", "training.steps=2"]
try:
    runpy.run_module("anychip", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


def test_the_compiler_is_imported_only_to_compile(tmp_path: Path) -> None:
    """It takes as long as torch itself; many a function of torch imports it without need."""
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    done = subprocess.run([sys.executable, "-c", _TRAIN], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
