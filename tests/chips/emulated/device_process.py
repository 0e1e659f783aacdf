"""Runs a function in processes of its own, which load the emulated device: it stays in a process for good."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from anychip.chips.compiling import find_compiler
from anychip.chips.emulated.build import library

# Imported once in the server that processes are forked from. Installed modules only: it does not see the tests' folder.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "anychip.train.engine",
]

needs_device = pytest.mark.skipif(find_compiler() is None, reason="the emulated device needs a C++ compiler")


def on_device(
    work: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    quirks: str = "",
    world_size: int = 1,
    chip: str = "emulated",
    timeout: float = 150.0,
) -> list[Any]:
    """What `work(*arguments)` returns (JSON) in each of `world_size` processes; their process group is initialised.

    Raises AssertionError with the tracebacks of those that failed.
    """
    library()  # compiled once, before the clock starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = folder / f"on-device-{uuid.uuid4().hex}"
    results.mkdir()
    processes = [
        context.Process(target=_process, args=(work, arguments, results, rank, world_size, chip, quirks))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(results.glob("error-*"))]
    codes = [process.exitcode for process in processes]
    assert not errors and codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(errors)
    return [json.loads((results / f"result-{rank}").read_text()) for rank in range(world_size)]


def _process(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Path,
    rank: int,
    world_size: int,
    chip: str,
    quirks: str,
) -> None:
    os.environ.update(
        ANYCHIP_CHIP=chip, ANYCHIP_EMULATED=quirks, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    from anychip.chips.backend import detect_backend

    torch.set_num_threads(1)
    try:
        backend = detect_backend()
        device = backend.device(rank)
        if world_size > 1:
            store = dist.FileStore(str(results / "store"), world_size)
            kinds = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend.collective_backend}"
            dist.init_process_group(kinds, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        (results / f"result-{rank}").write_text(json.dumps(work(*arguments)))
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (results / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
