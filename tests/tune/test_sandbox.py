"""What a program in the sandbox can not do."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from anychip.sandbox import Limits, Outcome, isolation, run_python

needs_isolation = pytest.mark.skipif(isolation() == "none", reason="this kernel grants no namespaces")


def run(program: str, **limits: float) -> Outcome:
    return run_python(program, Limits(**limits))  # type: ignore[arg-type]


def test_a_program_runs_and_is_heard() -> None:
    outcome = run("import json, math\nprint(json.dumps([math.sqrt(4), 'ü']))")
    assert outcome.passed and outcome.output == '[2.0, "\\u00fc"]\n' and not outcome.errors


@pytest.mark.parametrize(
    "program",
    ["raise ValueError('no')", "1 +", "import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os.abort()"],
)
def test_only_the_last_line_counts_as_passed(program: str) -> None:
    assert not run(program).passed


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_ends(program: str) -> None:
    started = time.monotonic()
    assert not run(program, seconds=1).passed
    assert time.monotonic() - started < 30


def test_memory_and_files_end() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)").errors
    assert not run("open('f', 'wb').write(b'x' * (32 << 20))").passed
    assert len(run("print('x' * (1 << 20))").output) == 64 << 10
    assert not run("while True: print('x' * 1000)", seconds=1).passed


def test_nothing_of_this_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    outcome = run("import os\nprint(dict(os.environ), os.listdir('.'))\nopen('kept', 'w').write('x')")
    assert outcome.passed and "secret" not in outcome.output and outcome.output.strip().endswith("[]")
    assert run("import os; assert not os.path.exists('kept')").passed
    assert not run("import anychip").passed
    assert not run("import torch").passed


@needs_isolation
def test_there_is_no_network() -> None:
    outcome = run("import socket\nsocket.create_connection(('127.0.0.1', 1), 1)")
    assert not outcome.passed and outcome.isolated and "unreachable" in outcome.errors


@needs_isolation
def test_nothing_can_be_written_elsewhere() -> None:
    """In a folder that everybody may write: pytest's own lie where only their owner comes, and programs may run as
    another user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        target = Path(folder) / "x"
        assert "Read-only" in run(f"open({str(target)!r}, 'w')").errors and not target.exists()


@needs_isolation
def test_what_a_program_starts_ends_with_it() -> None:
    """Where it may start anything at all: as a user that is not root it may not."""
    name = f"sleep 31.{os.getpid()}"
    run(f"import subprocess; subprocess.Popen({name.split()!r}, start_new_session=True)")
    time.sleep(0.2)
    running = [path.read_bytes().replace(b"\0", b" ") for path in Path("/proc").glob("[0-9]*/cmdline") if _there(path)]
    assert not any(name.encode() in line for line in running)


@needs_isolation
def test_other_processes_are_out_of_reach() -> None:
    assert not run(f"import os, signal; os.kill({os.getpid()}, 0)").passed


def _there(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
