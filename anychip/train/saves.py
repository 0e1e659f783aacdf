"""What is kept of a run and where: checkpoints on disk, and more often copies in the memory of hosts.

A process that dies takes its memory with it, but not files in /dev/shm, and a host that dies not those of others: the
next start reads them as it reads a checkpoint, verified byte by byte, without a disk.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anychip import alive
from anychip.data.cursor import DataCursor
from anychip.errors import AnychipError, InputError, UnfitError
from anychip.parallel.processes import Processes
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore
from anychip.train.engine import Engine
from anychip.train.guard import Guard, GuardState
from anychip.train.job import TrainingJob
from anychip.train.memory import MemoryCopies
from anychip.train.optimizer import Optimizer


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """The weights that are trained (this process's parts), by the names that checkpoints have for them."""
    return {f"model.{name}": parameter.detach() for name, parameter in engine.trainable.items()}


def state_of(engine: Engine, optimizer: Optimizer) -> dict[str, Tensor]:
    """These, and what the optimizer keeps."""
    return weights_of(engine) | {f"optimizer.{name}": value for name, value in optimizer.state().items()}


class Saves:
    """Saves and restores the state of a job; called by all its processes together."""

    def __init__(
        self, job: TrainingJob, engine: Engine, optimizer: Optimizer, guard: Guard, processes: Processes
    ) -> None:
        self._job, self._engine, self._optimizer, self._guard = job, engine, optimizer, guard
        self._processes = processes
        self._disk = CheckpointStore(job.checkpoint_root, job.checkpoint.keep, processes.new_control_group())
        self._memory = (
            MemoryCopies(job.directory, job.checkpoint.memory_peers, processes.new_control_group())
            if job.checkpoint.memory_interval
            else None
        )
        self._left_out = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by logical name; the live tensors (this process's parts), not copies."""
        return state_of(self._engine, self._optimizer)

    def prepare(self) -> None:
        """Set aside the host memory of the first copy."""
        if self._job.checkpoint.asynchronous:
            self._disk.prepare(self.state())
        if self._memory is not None:
            self._memory.prepare(self.state())

    def restore(self) -> tuple[int, DataCursor]:
        """Fill model, optimizer and guard from the newest good copy or checkpoint, or initialise them; returns the
        step, and where the data stands. Raises InputError when what is there is of another recipe."""
        alive.begin("restore")
        newest = self._newest()
        if self._job.witness:
            self._job.witness.restored(newest.step if newest else 0, newest, self._engine.arithmetic)
        if newest is None or len(self._engine.trainable) < len(self._engine.parameters):  # no checkpoint has the rest
            self._job.initialize(self._engine.parameters)
        if newest is None:
            self._optimizer.reset()
            self._guard.restore(GuardState())
            return 0, DataCursor()
        self._check_identity(newest.extra, newest.path)
        self._disk.load(newest, self._wanted(newest.extra), part=self._is_part)
        arithmetic = newest.extra.get("arithmetic", self._engine.arithmetic)
        if arithmetic != self._engine.arithmetic:
            print(
                f"note: the checkpoint was written by {arithmetic}, this is {self._engine.arithmetic}; sums may round "
                "differently from here on",
                file=sys.stderr,
            )
        self._guard.restore(GuardState.model_validate(newest.extra.get("guard", {})))
        return newest.step, DataCursor.of_json(newest.extra.get("skipped", []))

    def _newest(self) -> CheckpointInfo | None:
        """The newest of what is in memory and on disk; None for neither.

        Copies in memory are of what was trained since the last start from disk, and none survive the next one: a copy
        newer than the checkpoint that is gone back to would be of another history.
        """
        on_disk = self._disk.newest_step()
        if (found := self._in_memory(on_disk)) is not None:
            return found
        damage, info = None, None
        try:
            info = self._disk.latest()
        except UnfitError as error:
            damage = error
        good = info.step if info else 0
        if good < on_disk and (found := self._in_memory(good + 1)) is not None:  # older than what is damaged
            return found
        if damage:
            raise damage
        if self._memory:
            self._memory.start_over()
        return info

    def _in_memory(self, at_least: int) -> CheckpointInfo | None:
        """The newest whole copy in memory of this step or later, brought to where it is needed."""
        for found in self._memory.find(at_least) if self._memory else ():
            self._check_identity(found.manifest.extra, found.name)
            try:
                assert self._memory is not None
                return self._memory.fetch(found, self._wanted(found.manifest.extra), part=self._is_part)
            except UnfitError as error:  # an older one or the disk is there for that
                if self._processes.is_first:
                    print(f"warning: copy in memory is passed over: {error}", file=sys.stderr, flush=True)
        return None

    def _check_identity(self, extra: Mapping[str, Any], where: object) -> None:
        if extra.get("identity") not in (None, self._job.identity):
            raise InputError(
                "holds a checkpoint of a different model, data or schedule.",
                where=where,
                do="Give this recipe another name, or restore the recipe that the run was started with.",
            )

    def _wanted(self, extra: Mapping[str, Any]) -> dict[str, Tensor]:
        weights_only = extra.get("weights_only", False)
        return {k: v for k, v in self.state().items() if k.startswith("model.") or not weights_only}

    @property
    def _is_part(self) -> bool:
        return self._job.parallel.pipeline_parallel > 1

    def due(self, step: int, leaving: bool) -> bool:
        """Whether the state of this step is to be saved anywhere."""
        return leaving or self._is_due(step, self._job.checkpoint.save_interval) or self._is_due_in_memory(step)

    def _is_due_in_memory(self, step: int) -> bool:
        return self._is_due(step, self._job.checkpoint.memory_interval)

    @staticmethod
    def _is_due(step: int, interval: int) -> bool:
        return bool(interval) and step % interval == 0

    def save(self, step: int, cursor: DataCursor, *, last: bool) -> None:
        """Save where it is due; a failed save is reported and training goes on, except when it is the last thing the
        run does."""
        extra: dict[str, Any] = {
            "identity": self._job.identity,
            "arithmetic": self._engine.arithmetic,
            "skipped": cursor.as_json(),
            "guard": self._guard.state().model_dump(),
        }
        if self._job.witness:
            extra["attest"] = self._job.witness.claim(step, cursor)
        if self._job.lineage:
            extra["lineage"] = list(self._job.lineage)
        if self._memory and not last and self._is_due_in_memory(step):
            self._copy(self._memory, step, extra)
        if not (last or self._is_due(step, self._job.checkpoint.save_interval)):
            return
        try:
            if last or not self._job.checkpoint.asynchronous:
                self._disk.save(step, self.state(), extra)
            else:
                self._disk.save_async(step, self.state(), extra)
        except AnychipError as error:
            if last:
                raise
            print(f"warning: checkpoint of step {step} failed, training goes on: {error}", file=sys.stderr, flush=True)
        if self._job.witness:
            self._job.witness.settle()

    def _copy(self, memory: MemoryCopies, step: int, extra: dict[str, Any]) -> None:
        """Copy to memory, unless the copy before is still on its way anywhere: training does not wait for it."""
        if self._processes.any(memory.busy):
            self._left_out += 1
            if self._left_out == 1 and self._processes.is_first:
                print(
                    f"note: the copy of step {step} in memory is left out: the one before is still on its way. So may "
                    "others be, since checkpoint.memory_interval is shorter than a copy takes",
                    file=sys.stderr,
                    flush=True,
                )
            return
        memory.save_async(step, self.state(), extra)

    def leave(self) -> None:
        """The last state is on disk: give the memory back."""
        if self._memory is not None:
            self._memory.remove()
