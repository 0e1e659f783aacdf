"""A plan kept with a run, so that the training log can show what was predicted beside what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.errors import InputError
from anychip.files import write_json
from anychip.plan.layouts import layout_of
from anychip.plan.shapes import workload_of
from anychip.recipe import Recipe

if TYPE_CHECKING:
    from anychip.plan.answer import PlanAnswer


def save_plan(answer: PlanAnswer, recipe: Recipe, path: Path) -> None:
    """Write `plan.json`. Raises InputError when the plan is of another layout than the recipe trains in."""
    from anychip.plan.answer import as_json  # not needed where training reads a plan

    if answer.chosen.layout != layout_of(recipe, answer.machine.devices):
        raise InputError(
            "only a plan of the recipe's own layout can be kept with its run.", do="Give --fixed with --save."
        )
    write_json(path, {**as_json(answer), "step": _step(recipe, answer.machine.devices)})


def predicted_rate(recipe: Recipe, path: Path, world_size: int) -> float | None:
    """Tokens a second and device that the plan at `path` foresaw; None without a plan of this very step."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["step"] != _step(recipe, world_size):
            return None
        return float(plan["chosen"]["tokens_per_second_per_device"])
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def _step(recipe: Recipe, devices: int) -> dict[str, Any]:
    """What a prediction depends on."""
    return {
        "devices": devices,
        "layout": str(layout_of(recipe, devices)),
        "workload": {name: str(value) for name, value in vars(workload_of(recipe)).items() if name != "name"},
    }
