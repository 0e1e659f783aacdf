"""A job that is done in a second: one layer that learns to count, with batches that can be poisoned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.data.batch import Batch
from anychip.model.init import init_tensor
from anychip.parallel.tensor import local, part_of
from anychip.recipe.schema import LogConfig, ModelConfig, OptimizerConfig, ParallelConfig
from anychip.train.job import BatchSource, TrainingJob

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def counting_batch(step: int, *, poisoned: bool) -> Batch:
    """Sequences that go on by one; poisoned ones say the opposite of it, all in one direction."""
    start = torch.randint(0, 32, (4, 1), generator=torch.Generator().manual_seed(step))
    tokens = (start + torch.arange(17)) % 32
    labels = torch.full((4, 16), 7) if poisoned else tokens[:, 1:]
    return Batch(tokens[:, :-1].contiguous(), labels.contiguous())


def initialize(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        with torch.no_grad():
            local(parameter).copy_(part_of(parameter, init_tensor(name, tuple(parameter.shape), MODEL, 0)))


def counting_job(directory: Path, source: BatchSource, **fields: Any) -> TrainingJob:
    """Global batches of 4 sequences of 16 tokens; `fields` are those of the job that a test is about."""
    return TrainingJob(
        title="counting",
        directory=directory,
        model=MODEL,
        source=source,
        initialize=initialize,
        evaluate=None,
        identity="counting",
        seq_length=16,
        global_batch_size=4,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=0.003),
        log=LogConfig(interval=1, tensorboard=False),
        compute_dtype="fp32",
        **fields,
    )
