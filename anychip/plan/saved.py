"""A plan kept with a run, so that the training log can show what was predicted beside what is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.errors import InputError
from anychip.files import write_json
from anychip.plan.layouts import layout_of
from anychip.plan.shapes import workload_of
from anychip.recipe import Recipe

if TYPE_CHECKING:
    from anychip.plan.recipe_plan import ModelPlan


def save_plan(plans: Sequence[ModelPlan], path: Path) -> None:
    """Write `plan.json`, one plan for each of a recipe's models. Raises InputError when a plan is of another layout
    than the recipe trains in."""
    from anychip.plan.answer import as_json  # not needed where training reads a plan

    found = []
    for plan in plans:
        devices = plan.answer.machine.devices if plan.answer is not None else 0
        if plan.answer is None or plan.answer.chosen.layout != layout_of(plan.model.recipe, devices):
            raise InputError(
                "only a plan of the recipe's own layout can be kept with its run.", do="Give --fixed with --save."
            )
        found.append({**as_json(plan.answer), "step": _step(plan.model.recipe, devices)})
    write_json(path, {"models": found})


def predicted_rate(recipe: Recipe, path: Path, world_size: int) -> float | None:
    """Tokens a second and device that the plan at `path` foresaw for the model that the recipe starts with; None
    without a plan of this very step."""
    try:
        step = _step(recipe, world_size)
        for plan in json.loads(path.read_text(encoding="utf-8"))["models"]:
            if plan["step"] == step:
                return float(plan["chosen"]["tokens_per_second_per_device"])
        return None
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def _step(recipe: Recipe, devices: int) -> dict[str, Any]:
    """What a prediction depends on."""
    return {
        "devices": devices,
        "layout": str(layout_of(recipe, devices)),
        "workload": {name: str(value) for name, value in vars(workload_of(recipe)).items() if name != "name"},
    }
