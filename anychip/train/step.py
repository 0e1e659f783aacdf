"""One update of the model: what a step is, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from anychip.data.batch import Batch
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.processes import Processes
from anychip.train.copies import Flip
from anychip.train.engine import Engine
from anychip.train.guard import Guard, first_bad_tensor
from anychip.train.heartbeat import Heartbeat
from anychip.train.job import NewParts
from anychip.train.observe import Observer
from anychip.train.optimizer import Optimizer
from anychip.train.replay import ReplayFault
from anychip.train.sums import SumFault


@dataclass(frozen=True)
class Checks:
    """What looks for silent faults in a step; both answer the same on all processes whether there was one."""

    replayed: Callable[[Batch], tuple[Tensor, ReplayFault | SumFault | None]] | None = None
    flipped: Callable[[], Flip | None] | None = None


@dataclass(frozen=True)
class Growth:
    """A step's part in what is still new of a grown model."""

    parts: NewParts
    step: int

    def scale_gradients(self) -> None:
        self.parts.scale_gradients(self.step)

    def update(self, lr: float) -> AbstractContextManager[None]:
        return self.parts.update(self.step, lr)


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats a token) before the update, and the norm of its gradient before clipping. With a `problem`
    nothing was updated, and with a `fault` it lies in a chip, not in the data. `passing` is a problem that was gone
    when the step was computed again."""

    loss: float
    grad_norm: float
    problem: str = ""
    bad_tensor: str = ""
    fault: ReplayFault | SumFault | Flip | None = None
    passing: str = ""


def train_step(
    engine: Engine,
    optimizer: Optimizer,
    processes: Processes,
    batch: Batch,
    lr: float,
    grad_clip: float,
    guard: Guard,
    heartbeat: Heartbeat,
    checks: Checks = Checks(),
    observer: Observer = Observer(),
    growth: Growth | None = None,
) -> StepResult:
    """Gradients of a global batch, judged, clipped and applied: on all processes or on none.

    Gradients judged bad are computed once more: the data's fault comes back, a passing one of a chip does not
    (arXiv 2604.00726).
    """
    fault: ReplayFault | SumFault | Flip | None
    loss, grad_norm, fault = _gradients(engine, processes, batch, heartbeat, checks, growth)
    passing = "" if fault else guard.problem(loss, grad_norm)
    if passing:
        _drop_gradients(engine)
        loss, grad_norm, fault = _gradients(engine, processes, batch, heartbeat, checks, growth)
    heartbeat.beat("check")
    if fault is None and checks.flipped is not None:
        fault = checks.flipped()
    problem, bad_tensor = fault.describe() if fault else guard.judge(loss, grad_norm), ""
    if not problem:
        heartbeat.beat("optimizer")
        observer.reduced(loss, grad_norm)
        scale_gradients(engine.learned, grad_norm, grad_clip)
        observer.clipped()
        with growth.update(lr) if growth else nullcontext():
            optimizer.step(lr)
        observer.updated()
    elif not fault:
        bad_tensor = first_bad_tensor(engine.parameters)
    _drop_gradients(engine)
    return StepResult(loss, grad_norm, problem, bad_tensor, fault, "" if problem else passing)


def _gradients(
    engine: Engine,
    processes: Processes,
    batch: Batch,
    heartbeat: Heartbeat,
    checks: Checks,
    growth: Growth | None,
) -> tuple[float, float, ReplayFault | SumFault | None]:
    """Leaves the gradients; loss, norm and what a replay showed."""
    heartbeat.beat("forward_backward")
    loss, fault = checks.replayed(batch) if checks.replayed else (engine.forward_backward(batch), None)
    if growth:
        growth.scale_gradients()
    heartbeat.beat("reduce")
    return float(loss), float(gradient_norm(engine.learned, processes)), fault


def _drop_gradients(engine: Engine) -> None:
    for parameter in engine.parameters.values():
        parameter.grad = None
