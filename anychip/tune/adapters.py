"""Tuning with adapters: where they lie in a run, and how they become part of the weights.

RUN/sft/adapter/{checkpoints, logs, tb}     adapters alone
RUN/sft/checkpoints/step-N                  the whole model with its adapters merged in, as full tuning leaves it
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from anychip.errors import InputError
from anychip.model.arithmetic import parameter_shapes
from anychip.model.lora import adapter_shapes, merged
from anychip.recipe import Recipe
from anychip.recipe.schema import LoraConfig
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore


def adapter_directory(stage: Path) -> Path:
    """Where a stage trains its adapters."""
    return stage / "adapter"


def adapted_tensors(recipe: Recipe, lora: LoraConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Each matrix that has an adapter, with the names and shapes of the adapter's two halves."""
    return {
        name: adapter_shapes(name, shape, lora.rank)
        for name, shape in parameter_shapes(recipe.final_model)
        if name.startswith("layers.")
        and name.split(".")[-2] in lora.target_modules
        and name.endswith(".weight")
        and len(shape) == 2  # routed experts have none
    }


def newest_adapter(stage: Path) -> tuple[CheckpointStore, CheckpointInfo]:
    """The newest checkpoint of a stage's adapters. Raises InputError when there is none."""
    store = CheckpointStore(adapter_directory(stage) / "checkpoints")
    newest = store.latest()
    if newest is None:
        raise InputError("has no adapter: it was not tuned with lora.", where=stage, do="Add tune.sft.lora and tune.")
    return store, newest


def merge_adapter(recipe: Recipe, lora: LoraConfig, base: CheckpointStore, stage: Path) -> None:
    """Write the whole model of the newest adapter, one matrix in memory at a time. Called by all processes together;
    the first one writes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _merge(recipe, lora, base, stage)
    if dist.is_initialized():
        dist.barrier()


def _merge(recipe: Recipe, lora: LoraConfig, base: CheckpointStore, stage: Path) -> None:
    adapters, newest = newest_adapter(stage)
    whole, start = CheckpointStore(stage / "checkpoints", keep=1), base.latest()
    if start is None:
        raise InputError("there is no checkpoint to merge into.", where=stage)
    if newest.step in whole.steps():
        return
    adapted, scale = adapted_tensors(recipe, lora), lora.alpha / lora.rank
    with whole.stream(newest.step, {"weights_only": True}) as stream:
        for name, _ in parameter_shapes(recipe.final_model):
            ((_, weight),) = base.read(start, [f"model.{name}"])
            if name in adapted:
                halves = dict(adapters.read(newest, [f"model.{half}" for half in adapted[name]]))
                a, b = (halves[f"model.{half}"] for half in adapted[name])
                weight = merged(weight, a, b, scale)
            stream.add(f"model.{name}", weight)
