"""Where something may look on while a model trains: what is here sees nothing. A trace does (anychip/verify)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anychip.parallel.processes import Processes
    from anychip.train.engine import Engine
    from anychip.train.job import TrainingJob


class Observer:
    """Called by every process at the same places of every step; it may talk to the others, and changes nothing."""

    def attach(self, job: TrainingJob, engine: Engine, processes: Processes) -> None:
        """Once, when the model has its weights."""

    def begin(self, step: int, lr: float) -> None:
        """Before the forward passes of a step, counted from 1; again when the same step is computed again."""

    def reduced(self, loss: float, grad_norm: float) -> None:
        """Gradients are summed over processes, and judged good."""

    def clipped(self) -> None:
        """Gradients are what the optimizer will be given."""

    def updated(self) -> None:
        """Weights are those of the next step; gradients are still there."""
