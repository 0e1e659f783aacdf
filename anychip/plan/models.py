"""The models of a recipe that grows, one after the other: what each is asked to train, and for how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.errors import InputError
from anychip.plan.shapes import num_parameters, workload_of
from anychip.plan.types import Workload
from anychip.recipe import Recipe


@dataclass(frozen=True)
class ModelStage:
    """One of a recipe's models; a recipe without growth has one."""

    number: int  # growths before it
    of: int  # models of the recipe
    recipe: Recipe  # with this model alone
    workload: Workload
    start: float  # training tokens before it
    tokens: float  # training tokens of this model

    @property
    def title(self) -> str:
        """A heading for what is planned of it."""
        size = num_parameters(self.workload) / 1e9
        return (
            f"model {self.number} (of 0 to {self.of - 1}): {size:,.1f} B parameters, {self.tokens / 1e9:,.1f} B tokens "
            f"from {self.start / 1e9:,.1f} B on"
        )


def model_stages(recipe: Recipe, total_tokens: float | None = None, number: int | None = None) -> list[ModelStage]:
    """Every model of the recipe, or the one after `number` growths. `total_tokens` are of the whole job; default: those
    of training.steps. Raises InputError for a number that the recipe has not, and for a job that ends before it grows.
    """
    models, a_step = recipe.models, float(recipe.training.global_batch_size * recipe.training.seq_length)
    if number is not None and not 0 <= number < len(models):
        raise InputError(
            f"{recipe.name} has {len(models)} models, and --model-stage is {number}.",
            do="Models count from 0, the one that training starts with.",
        )
    starts = [0.0, *(step * a_step for step in recipe.growth_steps)]
    end = recipe.training.steps * a_step if total_tokens is None else total_tokens
    if end <= starts[-1]:
        raise InputError(
            f"{end:.4g} tokens end before the last growth at {starts[-1]:.4g}.", do="Give more --tokens, or none."
        )
    found = []
    for place, (model, start, stop) in enumerate(zip(models, starts, [*starts[1:], end], strict=True)):
        alone = recipe.model_copy(update={"model": model, "grow": []})
        found.append(ModelStage(place, len(models), alone, workload_of(alone), start, stop - start))
    return found if number is None else [found[number]]
