"""What a growth will take: bytes, memory, time. Sizes follow from the two models, speeds are measured here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from anychip.errors import InputError
from anychip.grow.plan import GrowthPlan, plan_growth
from anychip.grow.roles import split_layer
from anychip.grow.rows import Kind
from anychip.grow.state import MemoryRows
from anychip.grow.tensors import BLOCK_ELEMENTS, grown_strips
from anychip.model.arithmetic import flops_per_token, num_parameters, parameter_shapes
from anychip.recipe import ModelConfig, Recipe
from anychip.recipe.schema import GrowthConfig
from anychip.train.checkpoint.shard import byte_view
from anychip.train.optimizer import takes_muon

_TRIAL_BYTES = 128 << 20
_BLOCKS_AT_ONCE = 14
"""A block on its way is there in a handful of forms: gathered, drawn, shared, and three windows of the writer."""
_PROCESS_BYTES = 400 << 20
RELIABLE_FACTOR = 2.0
"""Growth by more than this in one step is outside what studies found to pay reliably (arXiv 2605.13405)."""


@dataclass(frozen=True)
class Speeds:
    """Bytes a second: of one process making grown tensors, and of the disk, written and flushed."""

    process: float
    disk: float


@dataclass(frozen=True)
class Estimate:
    """One growth. Bytes are of fp32 masters and the optimizer's moments; seconds are of the growth without its proof,
    which needs `proof_bytes` of memory: the largest layer in fp64."""

    number: int
    operators: list[str]
    old_parameters: int
    new_parameters: int
    read_bytes: int
    written_bytes: int
    processes: int
    process_bytes: int
    proof_bytes: int
    seconds: float
    tokens: int
    tokens_after: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        lines = [
            f"growth {self.number} after {self.tokens / 1e9:,.1f} B tokens: {'; '.join(self.operators)}",
            f"  parameters  {self.old_parameters:,} -> {self.new_parameters:,}",
            f"  disk        reads {_size(self.read_bytes)}, writes {_size(self.written_bytes)}",
            f"  memory      {_size(self.process_bytes)} a process, {self.processes} processes; the proof needs "
            f"{_size(self.proof_bytes)} once",
            f"  time        {_duration(self.seconds)}, without the proof",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def dry_run(recipe: Recipe, target: Path, processes: int, *, as_json: bool) -> str:
    """All growths of the recipe as text or JSON; speeds are measured at `target`."""
    if not recipe.grow:
        raise InputError("the recipe has no section grow.", do="Add grow: [{at_tokens: ..., to: {...}}].")
    speeds = measure_speeds(target)
    found = list(estimate(recipe, processes, speeds))
    grown, scratch = schedule_flops(recipe)
    if as_json:
        flops = {"grown": grown, "from_scratch": scratch}
        return json.dumps({"speeds": asdict(speeds), "growths": [f.as_json() for f in found], "flops": flops}, indent=2)
    head = f"measured here: {_size(speeds.process)}/s a process, {_size(speeds.disk)}/s written and flushed"
    tail = (
        f"training FLOPs {grown:.3g}; the last model over the same tokens {scratch:.3g} ({scratch / grown:.2f} times)"
    )
    return "\n".join([head, *(f.as_text() for f in found), tail])


def estimate(recipe: Recipe, processes: int, speeds: Speeds) -> Iterator[Estimate]:
    """Every growth of the recipe."""
    models = recipe.models
    batch = recipe.training.global_batch_size * recipe.training.seq_length
    ends = [*recipe.growth_steps, recipe.training.steps]
    for number, growth in enumerate(recipe.grow):
        old, new = models[number], models[number + 1]
        read, written = state_bytes(old, recipe.optimizer.name), state_bytes(new, recipe.optimizer.name)
        after = (ends[number + 1] - ends[number]) * batch
        yield Estimate(
            number=number,
            operators=_plan(old, growth).operators(),
            old_parameters=num_parameters(old),
            new_parameters=num_parameters(new),
            read_bytes=read,
            written_bytes=written,
            processes=processes,
            process_bytes=process_bytes(new),
            proof_bytes=max(_largest_layer(old), _largest_layer(new)) * 8 + _PROCESS_BYTES,
            seconds=written / min(processes * speeds.process, speeds.disk) + read / speeds.disk,
            tokens=ends[number] * batch,
            tokens_after=after,
            notes=list(_notes(old, new, ends[number] * batch, after)),
        )


def schedule_flops(recipe: Recipe) -> tuple[float, float]:
    """Training FLOPs of the recipe with its growth, and of its last model over the same tokens."""
    length = recipe.training.seq_length
    batch = recipe.training.global_batch_size * length
    ends = [0, *recipe.growth_steps, recipe.training.steps]
    each = [flops_per_token(model, length).model for model in recipe.models]
    grown = sum(cost * (ends[n + 1] - ends[n]) * batch for n, cost in enumerate(each))
    return grown, each[-1] * recipe.training.steps * batch


def state_bytes(config: ModelConfig, optimizer: str) -> int:
    """Bytes of a checkpoint: fp32 masters, AdamW's two moments or Muon's one."""
    total = 0
    for name, shape in parameter_shapes(config):
        moments = 1 if optimizer == "muon" and takes_muon(name) else 2
        total += 4 * prod(shape) * (1 + moments)
    return total


def process_bytes(config: ModelConfig) -> int:
    """Memory of a process that makes grown tensors: blocks, whatever the size of the model."""
    rows = max(prod(shape[1:]) for _, shape in parameter_shapes(config))
    return _PROCESS_BYTES + _BLOCKS_AT_ONCE * 4 * max(rows, BLOCK_ELEMENTS)


def measure_speeds(target: Path) -> Speeds:
    """A trial of a few seconds: a block is grown, and as much is written below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    side = 1024
    old = ModelConfig(
        vocab_size=8, hidden_size=side, intermediate_size=2 * side, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    name = "layers.0.mlp.up_proj.weight"
    growth = GrowthConfig(at_tokens=1, to={"intermediate_size": 4 * side, "hidden_size": 2 * side,
                                           "num_attention_heads": 16, "num_key_value_heads": 16})  # fmt: skip
    kinds: tuple[Kind, ...] = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    plan, rows = (
        plan_growth(old, growth, 0),
        MemoryRows({f"{kind}.{name}": torch.randn(2 * side, side) for kind in kinds}),
    )
    next(grown_strips(plan, "model", name, range(1), rows))
    started, made = time.perf_counter(), 0
    for kind in kinds:
        for strip in grown_strips(plan, kind, name, range(4 * side), rows):
            hashlib.sha256(byte_view(strip))
            made += strip.nbytes
    return Speeds(made / (time.perf_counter() - started), _disk_speed(target))


def _disk_speed(target: Path) -> float:
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=target) as file:
        started = time.perf_counter()
        for _ in range(_TRIAL_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
        return _TRIAL_BYTES / (time.perf_counter() - started)


def _plan(old: ModelConfig, growth: GrowthConfig) -> GrowthPlan:
    distances = [0.0] * old.num_hidden_layers  # which layers are copied changes no size
    return plan_growth(old, growth, 0, distances)


def _notes(old: ModelConfig, new: ModelConfig, tokens: int, after: int) -> Iterator[str]:
    factor = num_parameters(new) / num_parameters(old)
    if factor > RELIABLE_FACTOR:
        yield f"{factor:.1f} times the parameters in one growth; studies find about 2 reliable (arXiv 2605.13405)"
    before = tokens / num_parameters(old)
    if before > 20:
        yield f"{before:.0f} tokens a parameter before it; what growth saves fades above 20 (arXiv 2605.13405)"
    if after / num_parameters(new) < 1:
        yield f"{after / num_parameters(new):.3f} tokens a parameter after it: that trains few of the new ones"


def _largest_layer(config: ModelConfig) -> int:
    sizes: dict[int | None, int] = {}
    for name, shape in parameter_shapes(config):
        layer, _ = split_layer(name)
        key = -1 if layer is None else layer
        sizes[key] = max(sizes.get(key, 0), prod(shape)) if layer is None else sizes.get(key, 0) + prod(shape)
    return max(sizes.values())


def _size(nbytes: float) -> str:
    power = next((n for n in range(5) if nbytes < 1000 ** (n + 1)), 5)
    return f"{nbytes / 1000**power:,.1f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
