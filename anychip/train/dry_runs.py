"""Dry runs of all models of a recipe that grows. Each is one of a process of its own: PyTorch keeps what it knows of
meshes for as long as a process lives."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.train.dry_run import DryRun, dry_run


def dry_runs(recipe: Recipe, world_size: int, rank: int, number: int | None = None) -> list[DryRun]:
    """One rank with each of the recipe's models, or with the one after `number` growths. Once a process when that is
    one model. Raises InputError as `dry_run`, and for a number that the recipe has not."""
    models = recipe.models
    if number is not None and not 0 <= number < len(models):
        raise InputError(
            f"{recipe.name} has {len(models)} models, and --model-stage is {number}.",
            do="Models count from 0, the one that training starts with.",
        )
    chosen = models if number is None else [models[number]]
    alone = [recipe.model_copy(update={"model": model, "grow": []}) for model in chosen]
    if len(alone) == 1:
        return [dry_run(alone[0], world_size, rank)]
    found = []
    for one in alone:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(dry_run, one, world_size, rank).result())
    return found
