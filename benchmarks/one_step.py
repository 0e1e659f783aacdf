"""What a training step of one process consists of, ready to be taken: for benchmarks of what is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training import Shape, model_config


@dataclass(frozen=True)
class Parts:
    """The arguments of `train_step`, and the job they are of."""

    job: Any
    engine: Any
    optimizer: Any
    processes: Any
    batch: Any
    guard: Any
    heartbeat: Any

    def step(self, lr: float, *more: Any) -> Any:
        from anychip.train.step import train_step

        parts = self.engine, self.optimizer, self.processes, self.batch
        return train_step(*parts, lr, 1.0, self.guard, self.heartbeat, *more)


def prepare(title: str, shape: Shape, dtype_name: str) -> Parts:
    """One micro-batch of random tokens, fresh weights, a heartbeat that nobody hears."""
    from anychip.chips.backend import detect_backend
    from anychip.data.batch import Batch
    from anychip.model.init import init_tensor
    from anychip.parallel.layout import Layout
    from anychip.parallel.processes import Processes
    from anychip.recipe.schema import CheckpointConfig, GuardConfig, LogConfig, OptimizerConfig, ParallelConfig
    from anychip.train.engine import Engine
    from anychip.train.guard import Guard
    from anychip.train.heartbeat import Heartbeat
    from anychip.train.job import TrainingJob
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype

    backend = detect_backend()
    dtype, config = compute_dtype(dtype_name, backend), model_config(shape)
    job = TrainingJob(
        title=title,
        directory=Path(),
        model=config,
        source=None,
        initialize=lambda parameters: None,
        evaluate=None,
        identity="",
        steps=1,
        seq_length=shape.seq,
        micro_batch_size=shape.batch,
        global_batch_size=shape.batch,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
    )
    processes = Processes(job.parallel, Layout(), 0, backend.device(0))
    engine = Engine(job, processes, dtype)
    for name, parameter in engine.parameters.items():
        parameter.detach().copy_(init_tensor(name, parameter.shape, config, 0))
    optimizer = Optimizer(engine.parameters, job.optimizer, dtype)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return Parts(job, engine, optimizer, processes, batch, Guard(GuardConfig()), Heartbeat(None, 0))
