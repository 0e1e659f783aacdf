"""A dry run builds what the real rank would: same parameters, same optimizer, and messages that arithmetic predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
from rank_pool import run_ranks
from tiny_run import write_tiny_recipe

from anychip.errors import InputError
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe import Recipe, load_recipe
from anychip.train.dry_run import dry_run
from anychip.train.dry_runs import dry_runs

ROOT = Path(__file__).parents[2]
LAYOUTS: list[dict[str, int]] = [
    {},
    {"data_parallel_shard": 2, "tensor_parallel": 2},
    {"pipeline_parallel": 2},
]


def recipe_for(folder: Path, parallel: dict[str, int], **overrides: Any) -> Recipe:
    recipe = load_recipe(write_tiny_recipe(folder, micro_batch_size=1))
    return Recipe.model_validate({**recipe.model_dump(), "parallel": parallel, **overrides})


def world_size(parallel: dict[str, int]) -> int:
    return prod(parallel.values())


def run_dry(argument: tuple[Recipe, int, int, Path]) -> None:
    recipe, size, rank, out = argument
    (out / f"dry-{rank}.json").write_text(json.dumps(dry_run(recipe, size, rank).as_json()))


def dry(recipe: Recipe, size: int, rank: int, folder: Path) -> dict[str, Any]:
    """A dry run in a process of its own, because PyTorch keeps meshes for a process's lifetime."""
    run_ranks(1, run_dry, (recipe, size, rank, folder), folder)
    return json.loads((folder / f"dry-{rank}.json").read_text())


def count_for_real(argument: tuple[Recipe, Path]) -> None:
    """What a real rank holds after building engine and optimizer."""
    import torch

    from anychip.parallel.processes import Processes
    from anychip.parallel.tensor import local
    from anychip.train.engine import Engine
    from anychip.train.job import training_job
    from anychip.train.optimizer import Optimizer

    recipe, out = argument
    processes = Processes.join(recipe.parallel, torch.device("cpu"), "gloo")
    job = training_job(recipe, out, None, lambda parameters: None, None, "")  # type: ignore[arg-type]
    engine = Engine(job, processes, torch.float32)
    optimizer = Optimizer(engine.parameters, job.optimizer, torch.float32)
    held = {
        "parameter_bytes": sum(local(p).nbytes for p in engine.parameters.values()),
        "optimizer_bytes": sum(local(value).nbytes for value in optimizer.state().values()),
    }
    (out / f"{processes.rank}.json").write_text(json.dumps(held))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda parallel: "x".join(parallel) or "one")
def test_it_holds_what_a_real_rank_holds(tmp_path: Path, parallel: dict[str, int]) -> None:
    recipe, size = recipe_for(tmp_path, parallel), world_size(parallel)
    run_ranks(size, count_for_real, (recipe, tmp_path), tmp_path)
    for rank in dict.fromkeys((0, size - 1)):
        found = dry(recipe, size, rank, tmp_path)
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: found[name] for name in real} == real
        assert found["gradient_bytes"] == found["parameter_bytes"]
        memory = found["memory"]  # fp32: masters are what products read
        assert memory["weights"] >= found["parameter_bytes"] and memory["optimizer"] == found["optimizer_bytes"]
        assert memory["activations"] > 0 and sum(memory.values()) == found["total_bytes"]


def test_tensor_parallel_sends_what_arithmetic_says(tmp_path: Path) -> None:
    """Each layer gathers the sequence twice and scatters its sum twice, forward, and backward the other way round; the
    embedding scatters once and the head gathers once."""
    recipe = recipe_for(tmp_path, {"tensor_parallel": 2})
    sent = by_operation(dry(recipe, 2, 0, tmp_path), "tensor")
    model, training = recipe.model, recipe.training
    micro_batches = training.global_batch_size // training.micro_batch_size
    once = training.micro_batch_size * training.seq_length * model.hidden_size * 4 // 2  # half of it leaves, fp32
    passes = micro_batches * (4 * model.num_hidden_layers + 2)
    assert sent["allgather"]["bytes"] == passes * once
    assert sent["reduce_scatter"]["bytes"] == passes * once


def test_copies_send_every_gradient_once(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, {"data_parallel_replicate": 2})
    elements = sum(prod(shape) for _, shape in parameter_shapes(recipe.model))
    scalars = 4 + 8  # the loss and the squared norm
    assert by_operation(dry(recipe, 2, 1, tmp_path), "replicate")["allreduce"]["bytes"] == elements * 4 + scalars


def test_pipeline_stages_send_hidden_states(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, {"pipeline_parallel": 2})
    training = recipe.training
    hidden = training.global_batch_size * training.seq_length * recipe.model.hidden_size * 4
    assert by_operation(dry(recipe, 2, 0, tmp_path), "pipeline")["send"]["bytes"] == hidden


def by_operation(found: dict[str, Any], group: str) -> dict[str, Any]:
    return {entry["operation"]: entry for entry in found["traffic"] if entry["group"] == group}


@pytest.mark.parametrize(("size", "rank", "message"), [(4, 4, "no rank 4"), (3, 0, "needs 2 processes")])
def test_what_cannot_be_is_refused(tmp_path: Path, size: int, rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dry_run(recipe_for(tmp_path, {"tensor_parallel": 2, "data_parallel_replicate": size // 2}), size, rank)


@pytest.mark.slow
def test_a_recipe_that_grows_is_tried_with_each_model(tmp_path: Path) -> None:
    layers = load_recipe(write_tiny_recipe(tmp_path, micro_batch_size=1)).model.num_hidden_layers
    growth = [{"at_tokens": 1, "to": {"num_hidden_layers": layers + 2}}]
    path = write_tiny_recipe(tmp_path, micro_batch_size=1)
    words = ["train", str(path), "--dry-run", "--world-size", "2", "--rank", "1", "--json"]
    words += ["--set", "parallel.data_parallel_shard=2", "--set", f"grow={json.dumps(growth)}"]
    done = subprocess.run([sys.executable, "-m", "anychip", *words], capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout)["models"]
    assert small["layers"] == list(range(layers)) and large["layers"] == list(range(layers + 2))
    assert small["total_bytes"] < large["total_bytes"]
    with pytest.raises(InputError, match="has 2 models, and --model-stage is 2"):
        dry_runs(recipe_for(tmp_path, {"data_parallel_shard": 2}, grow=growth), 2, 1, 2)


@pytest.mark.slow
def test_the_published_model_on_8192_ranks(tmp_path: Path) -> None:
    recipe = load_recipe(
        ROOT / "recipes" / "telechat2-115b.yaml",
        ["parallel.tensor_parallel=8", "parallel.pipeline_parallel=8", "parallel.data_parallel_shard=16",
         "parallel.pipeline_schedule=interleaved", "parallel.virtual_pipeline=3"],
    )  # fmt: skip
    found = dry(recipe, 8192, 4097, tmp_path)
    model = recipe.model
    inner = [(name, shape) for name, shape in parameter_shapes(model) if name.startswith("layers.16.")]
    whole = sum(prod(shape) for _, shape in inner if not _is_copied(shape, model.hidden_size))
    copied = sum(prod(shape) for _, shape in inner if _is_copied(shape, model.hidden_size))
    assert found["layers"] == [*range(16, 20), *range(48, 52), *range(80, 84)]
    assert found["parameters"] == 12 * (whole // 8 + copied) // 16
    assert found["parameter_bytes"] == 4 * found["parameters"]
    assert sum(found["seconds"].values()) < 60


def _is_copied(shape: tuple[int, ...], hidden_size: int) -> bool:
    """Norms and the biases of products that are summed are whole on each tensor-parallel rank."""
    return shape == (hidden_size,)
