"""Experts shared by processes: they train as one process does, in fp64, whatever the layout and the way tokens take."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import LayoutRun, read, run_layouts, train
from rank_pool import run_ranks
from test_reshard import load_all, save_all

from anychip.errors import InputError
from anychip.parallel.layout import check_layout, resolve_layout
from anychip.recipe.schema import ModelConfig, ParallelConfig

STEPS = 3
NEAR = 1e-10  # relative, of gradients; losses and weights below
SOFTMAX = {"model": "softmax", "changes": {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}}
SIGMOID = {"model": "sigmoid", "changes": {"router_aux_loss_coef": 0.001, "num_nextn_predict_layers": 1}}
DROPPING = {"model": "sigmoid", "changes": {"hidden_dropout": 0.1, "num_nextn_predict_layers": 1}}
PLAIN = {"model": "sigmoid"}
QUERIES = {"model": "latent", "changes": {"q_lora_rank": 0}}
CAPACITY = {"model": "sigmoid", "changes": {"moe_capacity_factor": 1.0, "n_shared_experts": 2}}


def shards(size: int, experts: int, **more: Any) -> dict[str, Any]:
    return {"data_parallel_shard": size, "expert_parallel": experts, **more}


TWO = [
    LayoutRun(shards(2, 2), 4, SOFTMAX),
    LayoutRun(shards(2, 2), 4, SIGMOID),
    LayoutRun(shards(2, 2), 4, {**PLAIN, "recompute": "full"}),
    LayoutRun(shards(2, 2), 8, {**DROPPING, "recompute": "full"}),
    LayoutRun(shards(2, 2), 4, {**PLAIN, "recompute": "selective"}),
    LayoutRun(shards(2, 2), 8, {**PLAIN, "optimizer": "muon"}),
    LayoutRun({"data_parallel_shard": 2}, 4, SIGMOID),
    LayoutRun({"data_parallel_replicate": 2}, 4, SIGMOID),
    LayoutRun({"context_parallel": 2}, 4, PLAIN),
    LayoutRun({"pipeline_parallel": 2, "pipeline_schedule": "1f1b"}, 4, PLAIN),
    LayoutRun({"tensor_parallel": 2}, 8, SIGMOID),
    LayoutRun({"tensor_parallel": 2}, 8, SOFTMAX),
    LayoutRun({"tensor_parallel": 2}, 8, {**DROPPING, "recompute": "full"}),
    LayoutRun({"tensor_parallel": 2}, 16, {**CAPACITY, "recompute": "selective"}),
    LayoutRun({"tensor_parallel": 2}, 8, {**QUERIES, "recompute": "selective"}),
    LayoutRun({"tensor_parallel": 2}, 8, {**PLAIN, "optimizer": "muon"}),
]
FOUR = [
    LayoutRun(shards(4, 4), 4, SIGMOID),
    LayoutRun(shards(4, 4, expert_node_size=2), 4, SIGMOID),
    LayoutRun(shards(4, 4, expert_node_size=2), 4, SOFTMAX),
    LayoutRun(shards(4, 2), 4, SIGMOID),
    LayoutRun(shards(2, 2, data_parallel_replicate=2), 4, SIGMOID),
    LayoutRun(shards(2, 2, context_parallel=2), 4, PLAIN),
    LayoutRun(shards(2, 2, pipeline_parallel=2), 4, PLAIN),
    LayoutRun({"tensor_parallel": 4}, 8, SIGMOID),
    LayoutRun({"data_parallel_shard": 2, "tensor_parallel": 2}, 4, SIGMOID),
    LayoutRun({"data_parallel_replicate": 2, "tensor_parallel": 2}, 8, SOFTMAX),
    LayoutRun(shards(2, 2, tensor_parallel=2), 4, SIGMOID),
    LayoutRun({"pipeline_parallel": 2, "tensor_parallel": 2}, 4, PLAIN),
    LayoutRun({"context_parallel": 2, "tensor_parallel": 2}, 8, PLAIN),
]
EIGHT = [
    LayoutRun(shards(4, 2, tensor_parallel=2), 4, SIGMOID),
    LayoutRun(shards(4, 4, expert_node_size=2, tensor_parallel=2), 4, SOFTMAX),
    LayoutRun(shards(2, 2, tensor_parallel=2, data_parallel_replicate=2), 4, SIGMOID),
    LayoutRun(shards(2, 2, tensor_parallel=2, pipeline_parallel=2), 4, PLAIN),
    LayoutRun(shards(2, 2, tensor_parallel=2, context_parallel=2), 8, PLAIN),
]
RUNS = {run.name: run for run in (*TWO, *FOUR, *EIGHT)}


@cache
def alone(model: str, changes: str, optimizer: str) -> dict[str, Any]:
    run = next(r for r in RUNS.values() if _kind(r) == (model, changes, optimizer))
    job = {key: run.job[key] for key in ("model", "changes", "optimizer") if key in run.job}
    before = torch.get_default_dtype()
    try:
        return train(LayoutRun({}, 16, job), STEPS)
    finally:
        torch.set_default_dtype(before)


def _kind(run: LayoutRun) -> tuple[str, str, str]:
    return run.job["model"], str(run.job.get("changes")), run.job.get("optimizer", "adamw")


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))],
    ids=["2 processes", "4 processes", "8 processes"],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[LayoutRun]]:
    runs = {2: TWO, 4: FOUR, 8: EIGHT}[request.param]
    path = tmp_path_factory.mktemp("experts")
    run_layouts(runs, path, steps=STEPS)
    return path, runs


def test_they_train_as_one_process_does(folder: tuple[Path, list[LayoutRun]]) -> None:
    path, runs = folder
    for run in runs:
        found, right = read(run, path), alone(*_kind(run))
        assert found["losses"] == pytest.approx(right["losses"], rel=1e-11), run.name
        assert found["norms"] == pytest.approx(right["norms"], rel=1e-10), run.name
        assert found["score"] == pytest.approx(right["score"], rel=1e-11), run.name
        for kind in ("gradients", "weights"):
            assert {k for k in found["tensors"] if k.startswith(kind)} == {f"{kind}.{name}" for name in right[kind]}
            for name, tensor in right[kind].items():
                difference = (found["tensors"][f"{kind}.{name}"] - tensor).abs().max()
                limit = NEAR * tensor.abs().max() + (1e-15 if kind == "gradients" else 1e-9)
                assert difference <= limit, f"{run.name}: {kind} of {name} differ by {difference:.2g}"


def test_loads_moved_the_biases() -> None:
    """By whole steps of 0.001, from zero; or the comparison above would not show whether they move alike."""
    weights = alone("sigmoid", str(SIGMOID["changes"]), "adamw")["weights"]
    bias = weights["layers.1.mlp.gate.e_score_correction_bias"]
    moves = bias / 0.001
    torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-6)
    assert moves.min() < 0 < moves.max()


MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip
NO_EXPERTS = {"n_routed_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (shards(4, 4), {}, "does not divide n_routed_experts"),
        (shards(2, 4), {"n_routed_experts": 8}, "does not divide data_parallel_shard"),
        (shards(2, 2), NO_EXPERTS, "no experts"),
        (shards(2, 2, expert_node_size=2), {"moe_capacity_factor": 1.0}, "exclude each other"),
        (shards(3, 3, expert_node_size=2), {}, "expert_node_size 2 does not divide"),
        ({"tensor_parallel": 2}, {"moe_intermediate_size": 15}, "does not divide moe_intermediate_size 15"),
        ({"context_parallel": 2}, {"router_aux_loss_coef": 0.1}, "looks at whole sequences"),
        ({"pipeline_parallel": 2}, {"num_nextn_predict_layers": 1}, "embedding on the last"),
    ],
)
def test_what_cannot_be_is_refused(parallel: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = ParallelConfig(**parallel)
    layout = resolve_layout(config, config.processes_a_copy)
    with pytest.raises(InputError, match=message):
        check_layout(config, layout, ModelConfig(**{**MODEL.model_dump(), **changes}))


def test_a_checkpoint_of_shared_experts_fills_any_other_layout(tmp_path: Path) -> None:
    """The same bits by name: four processes in two groups, a group of two, and one process."""
    job = {**SIGMOID, "dtype": "float32"}
    saved = LayoutRun(shards(4, 2), 4, job)
    run_ranks(4, save_all, ([saved], tmp_path), tmp_path)
    cut = LayoutRun({"tensor_parallel": 2}, 8, job)
    for number, run in enumerate((LayoutRun(shards(2, 2), 4, job), LayoutRun({}, 4, job), cut)):
        run_ranks(run.world_size, load_all, ([(number, (saved, run))], tmp_path), tmp_path)
        assert all((tmp_path / f"loaded-{number}.{rank}").exists() for rank in range(run.world_size))
