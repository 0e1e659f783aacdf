"""Collectives between processes of this machine: two over gloo on a CPU, one a device on an accelerator.

    python -m anychip.chips.bench.collectives RANK WORLD_SIZE FILE

is one of these processes; the first one writes its times into FILE.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from anychip.chips.bench.timing import median_seconds
from anychip.chips.detect import detect_backend
from anychip.files import write_json

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24)  # bytes of the whole tensor
_LARGEST_WORLD = 8
_SECONDS = 60
_CALLS = 4


def measure_collectives(devices: int, on_cpu: bool) -> tuple[list[dict[str, Any]], str | None]:
    """Entries {op, backend, world_size, bytes, seconds, gb_per_s}, or none and the reason.

    gb_per_s is bus bandwidth: what one process sends and receives if the library works in a ring, 2 (w - 1) / w of the
    tensor for all_reduce and (w - 1) / w for the others.
    """
    cores = max(2, os.cpu_count() or 2)  # processes without a core of their own would measure the wait for one
    world_size = 2 if on_cpu else min(devices, _LARGEST_WORLD, cores)
    if world_size < 2:
        return [], "one device: nothing to communicate with"
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "store"
        children = [_start(rank, world_size, meeting, devices, on_cpu) for rank in range(world_size)]
        try:
            errors = [child.communicate(timeout=_SECONDS)[1] for child in children]
        except subprocess.TimeoutExpired:
            return [], f"the processes did not finish within {_SECONDS} seconds"
        finally:
            for child in children:
                child.kill()
        failed = [error for child, error in zip(children, errors, strict=True) if child.returncode]
        if failed:
            return [], (failed[0].strip().splitlines() or ["a process failed"])[-1]
        found: list[dict[str, Any]] = json.loads(meeting.with_suffix(".json").read_text(encoding="utf-8"))
        return found, None


def _start(rank: int, world_size: int, meeting: Path, devices: int, on_cpu: bool) -> subprocess.Popen[str]:
    """Processes on one CPU share its threads; the user's own setting stays."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size))} if on_cpu else {}
    return subprocess.Popen(
        [sys.executable, "-m", "anychip.chips.bench.collectives", str(rank), str(world_size), str(meeting)],
        env={**threads, **os.environ, "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "RANK": str(rank)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _take_part(rank: int, world_size: int, meeting: Path) -> None:
    import torch
    import torch.distributed as dist

    backend = detect_backend()
    backend.prepare_process()
    device = backend.device(rank)
    dist.init_process_group(backend.collective_backend, init_method=meeting.as_uri(), rank=rank, world_size=world_size)
    found = []
    for size in SIZES:
        whole = torch.zeros(size // 4, device=device)
        part = torch.zeros(size // 4 // world_size, device=device)
        calls: list[tuple[str, float, Callable[[], object]]] = [
            ("all_reduce", 2.0, partial(dist.all_reduce, whole)),
            ("all_gather", 1.0, partial(dist.all_gather_into_tensor, whole, part)),
            ("reduce_scatter", 1.0, partial(dist.reduce_scatter_tensor, part, whole)),
        ]
        for op, share, call in calls:
            seconds = _together(call, backend.synchronize)
            moved = share * (world_size - 1) / world_size * size
            found.append(
                {"op": op, "backend": backend.collective_backend, "world_size": world_size, "bytes": size}
                | {"seconds": seconds, "gb_per_s": moved / seconds / 1e9}
            )
    if rank == 0:
        write_json(meeting.with_suffix(".json"), found)
    dist.destroy_process_group()


def _together(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Every process must make the same number of calls, so the clock does not decide it."""
    return median_seconds(lambda: [call() for _ in range(_CALLS)], synchronize, seconds=0.0) / _CALLS


if __name__ == "__main__":
    _take_part(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
