"""Small training runs of any layout, traced; a bug may be put into them from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layout_runs import LayoutRun, build
from rank_pool import run_ranks

from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.verify.compare import Comparison, compare
from anychip.verify.record import Recorder
from anychip.verify.trace import read_trace

STEPS, LR, INTERVAL, CLIP = 4, 1e-3, 2, 0.5
Bug = Callable[[], None]


@dataclass(frozen=True)
class TracedRun:
    """A layout, in fp32 unless it says otherwise, and a bug: a function that patches this process."""

    layout: LayoutRun
    name: str
    bug: Bug | None = None


def run(traced: TracedRun, folder: Path, steps: int = STEPS) -> Path:
    """Train in processes of their own; returns the trace's path."""
    path = folder / f"{traced.name}.trace"
    run_ranks(traced.layout.world_size, _train, (traced, path, steps), folder, 200.0)
    return path


def compare_runs(one: TracedRun, other: TracedRun, folder: Path) -> Comparison:
    paths = [folder / f"{each.name}.trace" for each in (one, other)]
    for each, path in zip((one, other), paths, strict=True):
        if not path.exists():
            run(each, folder)
    return compare(*map(read_trace, paths))


def _train(argument: tuple[TracedRun, Path, int]) -> None:
    traced, path, steps = argument
    if "dtype" not in traced.layout.job:
        traced.layout.job["dtype"] = "float32"
    if traced.bug is not None:
        traced.bug()
    job, processes, engine, optimizer = build(traced.layout, steps)
    recorder = Recorder(path, INTERVAL, {}, 1 << 28)
    train_traced(job, processes, engine, optimizer, recorder, steps)


def train_traced(job: Any, processes: Any, engine: Any, optimizer: Any, recorder: Recorder, steps: int) -> None:
    """What `train_step` does, with the observer's calls."""
    recorder.attach(job, engine, processes)
    for step in range(1, steps + 1):
        lr = LR * min(1.0, step / 2)
        recorder.begin(step, lr)
        loss = float(engine.forward_backward(job.source.batch(step - 1)))
        norm = float(gradient_norm(engine.parameters.values(), processes))
        recorder.reduced(loss, norm)
        scale_gradients(engine.parameters.values(), norm, CLIP)
        recorder.clipped()
        optimizer.step(lr)
        recorder.updated()
        for parameter in engine.parameters.values():
            parameter.grad = None


def rank() -> int:
    return int(os.environ["RANK"])
