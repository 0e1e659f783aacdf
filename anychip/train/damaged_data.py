"""What training makes of a batch that holds tokens which are not what was packed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from anychip.data.batch import Batch
from anychip.data.integrity import DamagedBlock
from anychip.errors import UnfitError
from anychip.parallel.processes import Processes
from anychip.train.guard import BadSteps
from anychip.train.job import TrainingJob


class DamagedData:
    """Stops, or leaves the batch out on all processes although only one may have seen the damage: each reads with its
    own memory of the disk."""

    def __init__(self, job: TrainingJob, bad_steps: BadSteps, processes: Processes) -> None:
        self._job, self._bad_steps, self._processes = job, bad_steps, processes
        self._in_a_row = 0

    def checked(self, get: Callable[[], Batch], step: int, position: int) -> Batch | None:
        """The batch of a step (from 1), which is number `position`; None when it is to be left out.

        Raises DamagedBlock under the policy `stop`, UnfitError after too many damaged batches in a row.
        """
        if self._job.guard.on_damaged_data == "stop":
            return get()
        batch, damage = None, None
        try:
            batch = get()
        except DamagedBlock as error:
            damage = error
        if not self._processes.any(damage is not None):
            self._in_a_row = 0
            return batch
        self._in_a_row += 1
        if self._is_reporter(damage is not None):
            self._bad_steps.leave_out(step, position, str(damage), self._job.source.documents(position))
        if self._in_a_row >= self._job.guard.patience:
            raise damage or UnfitError(
                f"Training stopped: {self._in_a_row} batches in a row hold damaged data.",
                do="Process by process, logs/guard.jsonl names the files.",
            )
        return None

    def _is_reporter(self, found: bool) -> bool:
        """Whether this process is the first of those that found it."""
        world = self._processes.layout.world_size
        votes = torch.zeros(world, device=self._processes.device)
        votes[self._processes.rank] = float(found)
        return int(self._processes.sum(votes).argmax()) == self._processes.rank
