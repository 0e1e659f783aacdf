"""What one process reaches on its share of a CPU's cores while others compute on theirs.

It is not the whole's rate divided: fewer threads wait less for each other, more processes share caches and memory.

    python -m anychip.chips.bench.shares SECONDS

is one of these processes; it begins when it reads a line, so that all of them compute at one time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from anychip.chips.bench.computing import measure_computing
from anychip.chips.bench.timing import Bench
from anychip.chips.detect import detect_backend

PROCESSES = 2
_START_SECONDS = 60


def measure_shares(seconds: float) -> dict[str, Any] | None:
    """{processes, gemm, attention, loss, pointwise, memory_gb_per_s} of one of two processes, as in `measure_chip`.
    None where there are no cores for two, or they fail."""
    cores = os.cpu_count() or 1
    if cores < PROCESSES:
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores // PROCESSES), "ANYCHIP_CHIP": "cpu"}
    command = [sys.executable, "-m", "anychip.chips.bench.shares", str(seconds)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    children = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(PROCESSES)]
    try:
        ready = [child.stdout.readline() for child in children if child.stdout is not None]
        if not all(ready):
            return None
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        answers = [child.communicate(timeout=_START_SECONDS + 5 * seconds)[0] for child in children]
        found: dict[str, Any] = json.loads(answers[0])
        return {"processes": PROCESSES, **found}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    finally:
        for child in children:
            child.kill()
            child.wait()


def _take_part(seconds: float) -> None:
    import torch

    backend = detect_backend()
    backend.prepare_process()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    bench = Bench("cpu", backend.device(0), dtypes, backend.synchronize)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(measure_computing(bench, seconds)), flush=True)


if __name__ == "__main__":
    _take_part(float(sys.argv[1]))
