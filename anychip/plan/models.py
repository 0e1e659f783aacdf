"""The models of a recipe that grows, one after the other: what each is asked to train, and for how many tokens."""

from __future__ import annotations

import math
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
        return (
            f"model {self.number} (of 0 to {self.of - 1}): {amount(num_parameters(self.workload))} parameters, "
            f"{amount(self.tokens)} tokens from {amount(self.start)} on"
        )


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def amount(count: float) -> str:
    """A number of parameters or tokens in billions, or in what leaves figures before the point."""
    unit = next((unit for unit in "BMK" if count >= _UNITS[unit]), "")
    return f"{count / _UNITS[unit]:,.1f} {unit}" if unit else f"{count:,.0f}"


def tokens_of(text: str) -> float:
    """A number of tokens as people write it: 10T, 300B, 1e13. Raises InputError for what is no positive number."""
    body, unit = text.strip().replace(",", ""), 1.0
    if body and body[-1].upper() in _UNITS:
        body, unit = body[:-1], _UNITS[body[-1].upper()]
    try:
        return _positive(float(body) * unit, text)
    except ValueError:
        raise InputError(f"--tokens is {text!r}.", do="Give a number such as 10T, 300B or 1e13.") from None


def _positive(tokens: float, shown: object) -> float:
    if not (math.isfinite(tokens) and tokens > 0):
        raise InputError(f"--tokens is {shown}.", do="Give a positive number such as 10T, 300B or 1e13.")
    return tokens


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
    end = recipe.training.steps * a_step if total_tokens is None else _positive(total_tokens, f"{total_tokens:g}")
    if end <= starts[-1]:
        raise InputError(
            f"{end:.4g} tokens end before the last growth at {starts[-1]:.4g}.", do="Give more --tokens, or none."
        )
    found = []
    for place, (model, start, stop) in enumerate(zip(models, starts, [*starts[1:], end], strict=True)):
        alone = recipe.model_copy(update={"model": model, "grow": []})
        found.append(ModelStage(place, len(models), alone, workload_of(alone), start, stop - start))
    return found if number is None else [found[number]]
