"""One update of the model: what a step is, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.data.batch import Batch
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.processes import Processes
from anychip.train.engine import Engine
from anychip.train.guard import check_finite
from anychip.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats a token) before the update, and the norm of its gradient before clipping."""

    loss: float
    grad_norm: float


def train_step(
    engine: Engine, optimizer: Optimizer, processes: Processes, batch: Batch, step: int, lr: float, grad_clip: float
) -> StepResult:
    """Gradients of a global batch, checked, clipped and applied. `step` counts from 1 and only names the step.

    Raises UnfitError, with everything as it was, when the loss or the gradient norm is not finite.
    """
    loss = float(engine.forward_backward(batch))
    grad_norm = float(gradient_norm(engine.parameters.values(), processes))
    check_finite(engine.parameters, step, loss, grad_norm)
    scale_gradients(engine.parameters.values(), grad_norm, grad_clip)
    optimizer.step(lr)
    for parameter in engine.parameters.values():
        parameter.grad = None
    return StepResult(loss, grad_norm)
