"""The plan of a whole recipe: one answer for each of its models, and what they take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anychip.errors import InputError, UnfitError
from anychip.plan.answer import PlanAnswer, answer_plan
from anychip.plan.answer import as_json as answer_json
from anychip.plan.layouts import layout_of
from anychip.plan.models import ModelStage
from anychip.plan.question import Question
from anychip.plan.text import answer_as_text, days_text


@dataclass(frozen=True)
class ModelPlan:
    """What was planned of one model; `answer` is None where it fits in no layout, and `reason` says so."""

    model: ModelStage
    answer: PlanAnswer | None
    reason: str = ""

    @property
    def answered(self) -> PlanAnswer:
        assert self.answer is not None, self.reason
        return self.answer


def plan_recipe(question: Question, *, fixed: bool = False) -> list[ModelPlan]:
    """Plan each model of the question on its one kind of chips; `fixed`: in the recipe's own layout.

    Raises InputError or UnfitError when there is one model and it fits nowhere. Of several, the others are planned.
    """
    (machine,), (site,) = question.machines, question.sites
    plans = []
    for model in question.models:
        wanted = layout_of(model.recipe, machine.devices) if fixed else None
        try:
            answer = answer_plan(
                model.workload, machine, site, model.tokens, wanted, question.failures,
                model.recipe.parallel.context_method,
            )  # fmt: skip
        except (InputError, UnfitError) as error:
            if len(question.models) == 1:
                raise
            plans.append(ModelPlan(model, None, error.what))
        else:
            plans.append(ModelPlan(model, answer))
    return plans


def exit_code(plans: Sequence[ModelPlan]) -> int:
    """0 where any model can be trained."""
    return 0 if any(plan.answer is not None for plan in plans) else UnfitError.exit_code


def as_text(plans: Sequence[ModelPlan]) -> str:
    """A section a model, and the sum where there are several."""
    if plans[0].model.of == 1:
        return answer_as_text(plans[0].answered)
    sections = [
        f"{plan.model.title}\n\n{answer_as_text(plan.answer) if plan.answer is not None else plan.reason}"
        for plan in plans
    ]
    return "\n\n\n".join([*sections, _sum_in_words(plans)] if len(plans) > 1 else sections)


def _sum_in_words(plans: Sequence[ModelPlan]) -> str:
    total = totals(plans)
    if total is None:
        return "all models: not all of them fit on this machine"
    low, high = total["days_interval"]
    energy = "" if total["energy_mwh"] is None else f", {total['energy_mwh']:,.0f} MWh"
    return (
        f"all models: {days_text(total['days'])} days ({days_text(low)} to {days_text(high)}){energy}, "
        f"growing itself not counted"
    )


def totals(plans: Sequence[ModelPlan]) -> dict[str, Any] | None:
    """Days and energy of all models; None when one of them fits nowhere. Intervals are added end to end: what a site
    gets wrong it gets wrong of every model."""
    if any(plan.answer is None for plan in plans):
        return None
    found = [plan.answered.goodput for plan in plans]
    energies = [each.energy_mwh for each in found if each.energy_mwh is not None]
    return {
        "days": sum(each.days for each in found),
        "days_interval": [sum(each.days_interval[end] for each in found) for end in (0, 1)],
        "energy_mwh": sum(energies) if len(energies) == len(found) else None,
    }


def as_json(plans: Sequence[ModelPlan]) -> dict[str, Any]:
    """The answer of a recipe's one model; or those of several, and what they take together."""
    if len(plans) == 1:
        return answer_json(plans[0].answered)
    models = [
        {
            "growths": plan.model.number,
            "start_tokens": plan.model.start,
            **(answer_json(plan.answer) if plan.answer is not None else {"fits_nowhere": plan.reason}),
        }
        for plan in plans
    ]
    return {"models": models, "all": totals(plans)}
