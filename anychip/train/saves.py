"""What is kept of a run and where: checkpoints on disk, and more often copies in the host's memory.

A process that dies takes its memory with it, but not files in /dev/shm: the next start reads them as it reads a
checkpoint, verified byte by byte, without a disk (the idea of GEMINI, SOSP 2023, on one host).
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import Tensor

from anychip.data.cursor import DataCursor
from anychip.errors import AnychipError, InputError
from anychip.parallel.processes import Processes
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore
from anychip.train.engine import Engine
from anychip.train.guard import Guard, GuardState
from anychip.train.job import TrainingJob
from anychip.train.memory_copies import MemoryFolder
from anychip.train.optimizer import Optimizer

Place = Literal["disk", "memory"]


class Saves:
    """Saves and restores the state of a job; called by all its processes together."""

    def __init__(
        self, job: TrainingJob, engine: Engine, optimizer: Optimizer, guard: Guard, processes: Processes
    ) -> None:
        self._job, self._engine, self._optimizer, self._guard = job, engine, optimizer, guard
        self._is_first = processes.is_first
        self._disk = CheckpointStore(job.directory / "checkpoints", job.checkpoint.keep, processes.new_control_group())
        self._folder = MemoryFolder.open(job.directory, processes) if job.checkpoint.memory_interval else None
        self._memory = (
            CheckpointStore(self._folder.path, 2, processes.new_control_group()) if self._folder is not None else None
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by logical name; the live tensors (this process's parts), not copies."""
        named = {f"model.{name}": parameter.detach() for name, parameter in self._engine.trainable.items()}
        return named | {f"optimizer.{name}": value for name, value in self._optimizer.state().items()}

    def prepare(self) -> None:
        """Set aside the host memory of the first copy."""
        if self._job.checkpoint.asynchronous:
            self._disk.prepare(self.state())
        if self._memory is not None:
            self._memory.prepare(self.state())

    def restore(self) -> tuple[int, DataCursor]:
        """Fill model, optimizer and guard from the newest good checkpoint, or initialise them; returns the step, and
        where the data stands. Raises InputError when the checkpoint is of another recipe."""
        store, newest = self._newest()
        if newest is None or len(self._engine.trainable) < len(self._engine.parameters):  # no checkpoint has the rest
            self._job.initialize(self._engine.parameters)
        if newest is None:
            self._optimizer.reset()
            self._guard.restore(GuardState())
            return 0, DataCursor()
        if newest.extra.get("identity") not in (None, self._job.identity):
            raise InputError(
                "holds a checkpoint of a different model, data or schedule.",
                where=newest.path,
                do="Give this recipe another name, or restore the recipe that the run was started with.",
            )
        weights_only = newest.extra.get("weights_only", False)
        state = self.state()
        wanted = {k: v for k, v in state.items() if k.startswith("model.")} if weights_only else state
        store.load(newest, wanted, part=self._job.parallel.pipeline_parallel > 1)
        arithmetic = newest.extra.get("arithmetic", self._engine.arithmetic)
        if arithmetic != self._engine.arithmetic:
            print(
                f"note: the checkpoint was written by {arithmetic}, this is {self._engine.arithmetic}; sums may round "
                "differently from here on",
                file=sys.stderr,
            )
        self._guard.restore(GuardState.model_validate(newest.extra.get("guard", {})))
        return newest.step, DataCursor.of_json(newest.extra.get("skipped", []))

    def _newest(self) -> tuple[CheckpointStore, CheckpointInfo | None]:
        on_disk = self._disk.newest_step()
        if self._memory is not None and self._memory.newest_step() > on_disk:
            try:
                found = self._memory.latest()
            except AnychipError as error:  # the disk is there for that
                if self._is_first:
                    print(f"warning: copies in memory are passed over: {error}", file=sys.stderr, flush=True)
                found = None
            if found is not None and found.step > on_disk:
                return self._memory, found
        return self._disk, self._disk.latest()

    def due(self, step: int, leaving: bool) -> Place | None:
        """Where the state of this step is to be saved, if anywhere."""
        config = self._job.checkpoint
        if leaving or (config.save_interval and step % config.save_interval == 0):
            return "disk"
        return "memory" if config.memory_interval and step % config.memory_interval == 0 else None

    def save(self, place: Place, step: int, cursor: DataCursor, *, last: bool) -> None:
        """Save; a failed save is reported and training goes on, except when it is the last thing the run does."""
        store = self._memory if place == "memory" and self._memory is not None else self._disk
        extra: dict[str, Any] = {
            "identity": self._job.identity,
            "arithmetic": self._engine.arithmetic,
            "skipped": cursor.as_json(),
            "guard": self._guard.state().model_dump(),
        }
        try:
            if place == "disk" and (last or not self._job.checkpoint.asynchronous):
                store.save(step, self.state(), extra)
            else:
                store.save_async(step, self.state(), extra)
        except AnychipError as error:
            if last:
                raise
            print(f"warning: checkpoint of step {step} failed, training goes on: {error}", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """The last state is on disk: give the memory back."""
        if self._memory is not None and self._folder is not None:
            try:
                self._memory.wait()
            except AnychipError as error:
                print(f"warning: the last copy in memory failed: {error}", file=sys.stderr, flush=True)
            if self._is_first:
                self._folder.remove()
