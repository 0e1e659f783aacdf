"""A randomly initialised checkpoint of any recipe's model, in constant memory."""

from __future__ import annotations

from pathlib import Path

from anychip.model.arithmetic import num_parameters, parameter_shapes
from anychip.model.init import init_tensor
from anychip.progress import progress
from anychip.recipe.schema import Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore


def init_model(recipe: Recipe, run: RunDirectory) -> Path:
    """Write `checkpoints/step-000000` with the weights that training would start from; returns its directory.

    One tensor is in memory at a time. Raises InputError when the run already has that checkpoint.
    """
    store = CheckpointStore(run.model_checkpoints(recipe, 0))
    total = num_parameters(recipe.model)
    with store.stream(0, {"weights_only": True}) as stream, progress("initialise", total, "parameters") as bar:
        for name, shape in parameter_shapes(recipe.model):
            tensor = init_tensor(name, shape, recipe.model, recipe.seed)
            stream.add(f"model.{name}", tensor)
            bar.advance(tensor.numel())
    return store.open(0).path
