"""A checkpoint of any layout fills any other, optimizer included, and the run goes on with the same samples."""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import GLOBAL_BATCH, MODEL, SEQ_LENGTH, LayoutRun, RandomTokens, build
from rank_pool import run_ranks

from anychip.errors import InputError
from anychip.model.init import tensor_seed
from anychip.parallel.layout import check_batch, check_layout, resolve_layout
from anychip.parallel.tensor import local, part_of
from anychip.recipe.schema import ParallelConfig
from anychip.train.checkpoint import CheckpointStore

PAIRS, SEED = 40, 20261124
SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "dualpipe_v")


def legal_layouts() -> list[LayoutRun]:
    """Every layout of at most 8 processes that this model and batch can be cut into, with either optimizer."""
    found = []
    for replicate, shard, tensor, pipe, schedule, optimizer in itertools.product(
        (1, 2, 4), (1, 2, 3, 4), (1, 2, 4), (1, 2, 4), SCHEDULES, ("adamw", "muon")
    ):
        parallel: dict[str, Any] = {
            "data_parallel_replicate": replicate,
            "data_parallel_shard": shard,
            "tensor_parallel": tensor,
            "pipeline_parallel": pipe,
            "pipeline_schedule": schedule if pipe > 1 else "1f1b",
            "virtual_pipeline": 2 if pipe > 1 and schedule == "interleaved" else 1,
        }
        run = LayoutRun(parallel, 1, {"optimizer": optimizer, "dtype": "float32"})
        config = ParallelConfig(**parallel)
        if run.world_size > 8 or (pipe == 1 and schedule != "1f1b"):
            continue
        try:
            layout = resolve_layout(config, run.world_size)
            check_layout(config, layout, MODEL)
            check_batch(config, layout, SEQ_LENGTH, 1, GLOBAL_BATCH)
        except InputError:
            continue
        found.append(run)
    return found


def pairs() -> list[tuple[LayoutRun, LayoutRun]]:
    """Random pairs of two layouts with one optimizer; a saved one is loaded into several others."""
    chance, drawn = random.Random(SEED), []
    for optimizer in ("adamw", "muon"):
        layouts = [run for run in legal_layouts() if run.job["optimizer"] == optimizer]
        saved = chance.sample(layouts, 6)
        drawn += [(one, chance.choice([run for run in layouts if run != one])) for one in saved * 4][: PAIRS // 2]
    return drawn


def content(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor of the state holds, from its name alone."""
    generator = torch.Generator().manual_seed(tensor_seed(SEED, name))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def live_state(run: LayoutRun) -> tuple[Any, dict[str, torch.Tensor]]:
    _, processes, engine, optimizer = build(run)
    state = {f"model.{name}": p.detach() for name, p in engine.parameters.items()}
    state |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    return processes.new_control_group(), state


def save_all(argument: tuple[list[LayoutRun], Path]) -> None:
    runs, folder = argument
    for run in runs:
        group, state = live_state(run)
        for name, tensor in state.items():
            local(tensor).copy_(part_of(tensor, content(name, tensor.shape, tensor.dtype)))
        CheckpointStore(folder / run.name, group=group).save(7, state, {"layout": run.name})


def load_all(argument: tuple[list[tuple[int, tuple[LayoutRun, LayoutRun]]], Path]) -> None:
    drawn, folder = argument
    for number, (saved, run) in drawn:
        group, state = live_state(run)
        for tensor in state.values():
            local(tensor).fill_(torch.nan)
        store = CheckpointStore(folder / saved.name, group=group)
        newest = store.latest()
        assert newest is not None and newest.step == 7
        store.load(newest, state, part=True)
        for name, tensor in state.items():
            expected = part_of(tensor, content(name, tensor.shape, tensor.dtype))
            assert torch.equal(local(tensor), expected), f"{saved.name} -> {run.name}: {name}"
        (folder / f"loaded-{number}.{os.environ['RANK']}").touch()


def by_world_size(items: list[Any], run_of: Any) -> dict[int, list[Any]]:
    groups: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        groups[run_of(item).world_size].append(item)
    return groups


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forty_random_pairs_of_layouts_hold_the_same_bits_by_name(tmp_path: Path) -> None:
    drawn = pairs()
    saved = list({run.name: run for run, _ in drawn}.values())
    for world_size, runs in by_world_size(saved, lambda run: run).items():
        run_ranks(world_size, save_all, (runs, tmp_path), tmp_path, timeout=900)
    for world_size, part in by_world_size(list(enumerate(drawn)), lambda item: item[1][1]).items():
        run_ranks(world_size, load_all, (part, tmp_path), tmp_path, timeout=900)
    assert all(
        (tmp_path / f"loaded-{n}.{r}").exists() for n, (_, run) in enumerate(drawn) for r in range(run.world_size)
    )


def test_readers_of_any_layout_share_out_each_global_batch_exactly() -> None:
    """Which rows a step trains on depends on the step alone: every layout reads each row once."""
    batch = RandomTokens().batch(3)
    for run in legal_layouts():
        layout = resolve_layout(ParallelConfig(**run.parallel), run.world_size)
        share = GLOBAL_BATCH // layout.readers
        rows = [range(layout.reader(rank) * share, (layout.reader(rank) + 1) * share) for rank in range(run.world_size)]
        copies = run.world_size // layout.readers
        read = sorted(row for part in rows for row in part)
        assert read == sorted(list(range(len(batch.input_ids))) * copies)
