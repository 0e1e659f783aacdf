"""A bit that turns over in one copy of a weight or of optimizer state is found, named and healed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_job import MODEL, initialize
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import run_ranks
from test_guard import STEPS, Tokens

from anychip.errors import UnfitError
from anychip.parallel.tensor import local
from anychip.recipe.schema import CheckpointConfig, GuardConfig, LogConfig, OptimizerConfig, ParallelConfig
from anychip.train import loop
from anychip.train.checkpoint import CheckpointStore
from anychip.train.copies import digest
from anychip.train.job import TrainingJob
from anychip.train.loop import run_training

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_one_flipped_bit_always_changes_the_digest(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    before = int(digest(tensor))
    raw = tensor.view(torch.uint8).reshape(-1)
    byte, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[byte] ^= 1 << bit
    assert int(digest(tensor)) != before


def job_in(folder: Path, parallel: dict[str, Any], patience: int = 10) -> TrainingJob:
    return TrainingJob(
        title="copies",
        directory=folder,
        model=MODEL,
        source=Tokens(set()),
        initialize=initialize,
        evaluate=None,
        identity="copies",
        steps=STEPS,
        seq_length=16,
        micro_batch_size=1,
        global_batch_size=4,
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=0.003),
        checkpoint=CheckpointConfig(save_interval=6, keep=0, asynchronous=False),
        log=LogConfig(interval=1, tensorboard=False),
        compute_dtype="fp32",
        guard=GuardConfig(digest_interval=4, patience=patience),
    )


def train_with_a_flip(argument: tuple[Path, dict[str, Any], int | None, str, int], patience: int = 10) -> None:
    """Rank `victim` finds bit `bit` of the first element of tensor `name` turned over after step 9."""
    folder, parallel, victim, name, bit = argument
    torch.set_num_threads(1)
    real, made = loop.train_step, 0

    def step_with_a_flip(engine: Any, optimizer: Any, processes: Any, *rest: Any) -> Any:
        nonlocal made
        done, made = real(engine, optimizer, processes, *rest), made + 1
        if made == 9 and processes.rank == victim:
            kind, rest_of_name = name.split(".", 1)
            tensor = (engine.parameters if kind == "model" else optimizer.state())[rest_of_name]
            with torch.no_grad():
                local(tensor).view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)
        return done

    loop.train_step = step_with_a_flip  # type: ignore[assignment]
    run_training(job_in(folder, parallel, patience))


def stop_at_a_flip(argument: tuple[Path, dict[str, Any], int | None, str, int]) -> None:
    with pytest.raises(UnfitError, match="no majority says which is right; times that this was so: 1"):
        train_with_a_flip(argument, patience=1)


def final(folder: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(folder / "checkpoints")
    info = store.open(STEPS)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "logs" / "guard.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("parallel", "name"),
    [
        ({"data_parallel_replicate": 4}, "model.layers.0.mlp.up_proj.weight"),
        ({"data_parallel_replicate": 4}, "optimizer.exp_avg_sq.embed_tokens.weight"),
        ({"tensor_parallel": 1, "context_parallel": 4}, "model.norm.weight"),
    ],
)
def test_the_majority_repairs_and_names_the_rank(tmp_path: Path, parallel: dict[str, Any], name: str) -> None:
    run_ranks(4, train_with_a_flip, (tmp_path / "run", parallel, 2, name, 20), tmp_path)
    found = events(tmp_path / "run")
    assert name in {event["tensor"] for event in found}
    assert all((event["step"], event["ranks"], event["action"]) == (12, [2], "repair") for event in found)


def test_two_copies_go_back_to_the_checkpoint_and_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    parallel, name = {"data_parallel_replicate": 2}, "optimizer.exp_avg.lm_head.weight"
    run_ranks(2, train_with_a_flip, (tmp_path / "run", parallel, 1, name, 30), tmp_path)
    run_ranks(2, train_with_a_flip, (tmp_path / "clean", parallel, None, name, 30), tmp_path)
    found, expected = final(tmp_path / "run"), final(tmp_path / "clean")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all((event["action"], event["ranks"]) == ("reload", [0, 1]) for event in events(tmp_path / "run"))
    assert name in {event["tensor"] for event in events(tmp_path / "run")}
    assert events(tmp_path / "clean") == []


def test_copies_of_shards_are_compared_shard_by_shard(tmp_path: Path) -> None:
    parallel, name = {"data_parallel_replicate": 2, "data_parallel_shard": 2}, "model.layers.0.mlp.gate_proj.weight"
    run_ranks(4, train_with_a_flip, (tmp_path / "run", parallel, 3, name, 3), tmp_path)
    reloaded = [event for event in events(tmp_path / "run") if event["tensor"] == name]
    assert [(event["step"], event["ranks"], event["action"]) for event in reloaded] == [(12, [1, 3], "reload")]


def test_all_ranks_stop_for_copies_that_two_of_them_hold(tmp_path: Path) -> None:
    parallel, name = {"data_parallel_replicate": 2, "data_parallel_shard": 2}, "model.layers.0.mlp.gate_proj.weight"
    run_ranks(4, stop_at_a_flip, (tmp_path / "run", parallel, 3, name, 3), tmp_path)
    assert {tuple(event["ranks"]) for event in events(tmp_path / "run")} == {(1, 3)}
