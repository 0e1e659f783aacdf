"""Whatever system call of a save fails, or is the last one of a process or of the machine, the old or the new
checkpoint is there. All calls, of all threads and ranks: `pytest -m slow tests/checkpoint/test_checkpoint_crash.py`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from disk_shim import DiskShim
from fault_process import CLAIMED, FAULTS, LAST
from power_cut import Disk, read_trace
from tiny_state import newest, same, tiny_state
from torch import Tensor

from anychip.train.checkpoint import CheckpointStore

RANDOM_CUTS = 3


def fault_process(folder: Path, environment: Mapping[str, str], *arguments: object, timeout: float) -> dict[str, Any]:
    script = Path(__file__).with_name("fault_process.py")
    run = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("scenario", "fault", "every"),
    [
        ("blocking", "kill", 1),
        ("blocking", "input/output error, once", 3),
        ("background", "disk full from there on", 3),
        ("copies", "kill", 9),
        ("ranks", "kill", 11),
        ("ranks", "input/output error, once", 11),
        ("ranks in background", "quota used up from there on", 11),
    ],
)
def test_a_fault_at_a_call_leaves_exactly_old_or_exactly_new(
    memory: Path, shim: DiskShim, shimmed: Mapping[str, str], scenario: str, fault: str, every: int
) -> None:
    found = fault_process(memory, shimmed, scenario, fault, memory, every, timeout=250)
    assert found["calls"] > 60 and len(range(1, found["calls"] + 1, every)) - 1 <= found["struck"]
    assert found["old"] and found["new"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scenario", LAST)
def test_a_fault_at_every_call(
    memory: Path, shim: DiskShim, shimmed: Mapping[str, str], scenario: str, fault: str
) -> None:
    found = fault_process(memory, shimmed, scenario, fault, memory, timeout=1100)
    print(scenario, fault, found)
    assert found["calls"] > 60 and found["struck"] > 0.9 * found["calls"]  # the last ones alter nothing


def cut_everywhere(folder: Path, random_cuts: int) -> int:
    """Cut the power between any two calls of a trace, and load; returns how often."""
    disk, chance = Disk(folder / "root", folder / "before"), random.Random(0)
    states: dict[int, dict[str, Tensor]] = {}
    cuts, claimed = 0, 1
    for call in [None, *read_trace(folder / "trace")]:
        if call is not None and call.kind == CLAIMED:
            claimed = call.offset
        elif call is not None:
            disk.replay(call)
        for number in range(2 + random_cuts):
            root = folder / f"cut-{cuts}"
            disk.leave(root, chance if number > 1 else None, entries_kept=number == 1)
            with redirect_stderr(StringIO()):  # it says which one was never finished
                step, state = newest(root)
            states.setdefault(step, tiny_state(step))
            assert same(state, states[step]), f"after {call}"
            assert step >= claimed, f"after {call}: step {claimed} was reported as saved and is not there"
            for complete in CheckpointStore(root).steps():
                if number < 2:
                    CheckpointStore(root).open(complete)
            cuts += 1
    return cuts


@pytest.mark.parametrize("scenario", ["background", "ranks"])
def test_a_power_cut_after_any_call_leaves_exactly_old_or_exactly_new(
    memory: Path, shim: DiskShim, shimmed: Mapping[str, str], scenario: str
) -> None:
    fault_process(memory, shimmed, scenario, "trace", memory, timeout=200)
    assert cut_everywhere(memory, RANDOM_CUTS) > 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", LAST)
def test_many_power_cuts_after_every_call(
    memory: Path, shim: DiskShim, shimmed: Mapping[str, str], scenario: str
) -> None:
    fault_process(memory, shimmed, scenario, "trace", memory, timeout=200)
    print(scenario, cut_everywhere(memory, 40), "power cuts")
