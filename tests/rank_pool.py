"""Spawned gloo ranks on this machine, with a hard time-out and the traceback of the one that failed."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def run_ranks(
    world_size: int,
    work: Callable[[Any], None],
    argument: Any,
    folder: Path,
    timeout: float = 240.0,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Call `work(argument)` in `world_size` processes that form a process group (none for one process).

    Each call has a rendezvous file of its own, so that no late process of an earlier one can join. Raises
    AssertionError when a rank fails or the time is over; no process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_pool_imports"])
    _start_server()
    store = folder / f"rendezvous-{uuid.uuid4().hex}"
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, work, argument, store, dict(environment or {})))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in ranks):
                time.sleep(1.0)  # let the others write their tracebacks
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob(f"{store.name}.error-*"))]
    assert not errors and codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(errors)


def _start_server() -> None:
    """Start the server that ranks are forked from, once. It looks for what to import in PYTHONPATH alone: without this
    folder there, every rank would import everything by itself."""
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), paths]))
    try:
        forkserver.ensure_running()
    finally:
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths


def _rank(
    rank: int, world_size: int, work: Callable[[Any], None], argument: Any, store: Path, environment: dict[str, str]
) -> None:
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))

    import torch
    import torch.distributed as dist

    from anychip.chips.backend import detect_backend
    from anychip.parallel.processes import group_backends

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        if world_size > 1:
            backend = detect_backend()
            backends = group_backends(backend.device(rank), backend.collective_backend)
            rendezvous = dist.FileStore(str(store), world_size)
            dist.init_process_group(backends, store=rendezvous, rank=rank, world_size=world_size)
        work(argument)
    except BaseException:
        store.with_name(f"{store.name}.error-{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
