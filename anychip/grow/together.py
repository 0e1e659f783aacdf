"""Growth by the processes that torchrun started, on any number of hosts that see the same folders: each makes a share
of the files, the first one begins and publishes. Where one fails, all end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from anychip.grow.proof import Proof
from anychip.grow.stream import Stream, grow_checkpoint
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ParallelConfig
from anychip.train.checkpoint import CheckpointError, CheckpointStore
from anychip.train.checkpoint.directory import only_writer


def ranks(parallel: ParallelConfig | None = None) -> Processes | None:
    """The processes that torchrun started, in this layout or as equals; None for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return Processes.join_here(parallel or ParallelConfig())


def open_store(checkpoints: Path, processes: Processes | None) -> CheckpointStore:
    """Checkpoints that the processes read together: each verifies a share of one when it is opened."""
    return CheckpointStore(checkpoints, group=None if processes is None else processes.new_control_group())


def grow_together(
    stream: Stream,
    texts: Mapping[str, Tensor],
    processes: Processes | None,
    workers: int = 1,
    *,
    prove_it: bool = True,
) -> Proof | None:
    """As `stream.grow_checkpoint`, by all of `processes` (one alone has that many `workers`). The proof on the first of
    them; None elsewhere, and where nothing is proved."""
    if processes is None:
        return grow_checkpoint(stream, texts, workers, prove_it=prove_it)
    proofs: list[Proof | None] = []
    with ExitStack() as held:

        def begin() -> None:
            stream.target.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_writer(stream.target))
            stream.begin()

        first, size = processes.is_first, processes.layout.world_size
        _by_all(processes, begin if first else None)
        _by_all(processes, lambda: stream.make(stream.units()[processes.rank :: size]))
        _by_all(processes, (lambda: proofs.append(stream.publish(texts, prove_it=prove_it))) if first else None)
    return proofs[0] if proofs else None


def _by_all(processes: Processes, work: Callable[[], None] | None) -> None:
    """Do a step and wait until all have; raises on every process when it failed on one."""
    failure: Exception | None = None
    try:
        if work is not None:
            work()
    except Exception as error:  # whatever it is, the others must not wait for this process
        failure = error
    if processes.any(failure is not None):
        raise failure or CheckpointError("another process could not do its part of the growth and says why.")
