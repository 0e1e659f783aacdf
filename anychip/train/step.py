"""One update of the model: what a step is, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.data.batch import Batch
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.processes import Processes
from anychip.train.engine import Engine
from anychip.train.guard import Guard, first_bad_tensor
from anychip.train.heartbeat import Heartbeat
from anychip.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats a token) before the update, and the norm of its gradient before clipping. With a `problem`
    nothing was updated."""

    loss: float
    grad_norm: float
    problem: str = ""
    bad_tensor: str = ""


def train_step(
    engine: Engine,
    optimizer: Optimizer,
    processes: Processes,
    batch: Batch,
    lr: float,
    grad_clip: float,
    guard: Guard,
    heartbeat: Heartbeat,
) -> StepResult:
    """Gradients of a global batch, judged, clipped and applied: on all processes or on none."""
    heartbeat.beat("forward_backward")
    loss = float(engine.forward_backward(batch))
    heartbeat.beat("reduce")
    grad_norm = float(gradient_norm(engine.parameters.values(), processes))
    heartbeat.beat("check")
    problem, bad_tensor = guard.judge(loss, grad_norm), ""
    if problem:
        bad_tensor = first_bad_tensor(engine.parameters)
    else:
        heartbeat.beat("optimizer")
        scale_gradients(engine.parameters.values(), grad_norm, grad_clip)
        optimizer.step(lr)
    for parameter in engine.parameters.values():
        parameter.grad = None
    return StepResult(loss, grad_norm, problem, bad_tensor)
