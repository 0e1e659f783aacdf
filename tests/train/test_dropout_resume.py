"""A run with dropout that stops and goes on draws what it would have drawn, and every step draws anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_job import MODEL, counting_batch, counting_job
from torch import Tensor

from anychip.data.batch import Batch
from anychip.recipe.schema import CheckpointConfig
from anychip.train.checkpoint import CheckpointStore
from anychip.train.loop import run_training


class Counting:
    """The same batch in every step: only dropout makes one step unlike another."""

    def batch(self, step: int) -> Batch:
        return counting_batch(0, poisoned=False)

    def documents(self, step: int) -> list[str]:
        return []


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    def run(name: str, *, until: int = 8, rate: float = 0.2, **fields: Any) -> dict[str, Tensor]:
        checkpoint = CheckpointConfig(save_interval=1, keep=0, asynchronous=False)
        job = counting_job(tmp_path / name, Counting(), steps=8, micro_batch_size=2, checkpoint=checkpoint, **fields)
        run_training(replace(job, until=until, model=MODEL.model_copy(update={"hidden_dropout": rate})))
        store = CheckpointStore(tmp_path / name / "checkpoints")
        newest = store.latest()
        assert newest is not None and newest.step == until
        return {name: tensor.clone() for name, tensor in store.read(newest, newest.tensors)}

    return run


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_run_that_goes_on_draws_the_same_masks(train: Callable[..., dict[str, Tensor]]) -> None:
    at_once = train("at once")
    train("stopped", until=3)
    assert same(train("stopped"), at_once)
    assert not same(train("without dropout", rate=0.0), at_once)
    assert not same(train("another seed", seed=1), at_once)
