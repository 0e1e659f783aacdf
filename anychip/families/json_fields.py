"""Fields of a config.json that somebody else wrote, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anychip.errors import InputError
from anychip.recipe.schema import ModelConfig

LARGEST = 1 << 40
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Field:
    """A field of ModelConfig, and its name in the file where that is another."""

    name: str
    published: str = ""
    optional: bool = False


def fields_of(raw: Mapping[str, Any], wanted: Sequence[Field], where: str) -> dict[str, Any]:
    """Those that the file has. Raises InputError for one that is missing or no positive number."""
    found = {}
    for field in wanted:
        name = field.published or field.name
        if raw.get(name) is None and field.optional:
            continue
        found[field.name] = number(raw, name, where)
    return found


def number(raw: Mapping[str, Any], name: str, where: str, default: float | None = None) -> int | float:
    """A positive number. Raises InputError when it is missing without a default, or something else."""
    value = raw.get(name, default)
    if value is None:
        raise InputError(f"lacks {name}.", where=where, do="Give a complete config.json.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        raise InputError(f"has {name} {shown(value)}, which is not a positive number.", where=where)
    return value


def rope_of(raw: Mapping[str, Any], where: str) -> tuple[float | None, Mapping[str, Any] | None]:
    """(rope_theta, scaling), from either of the two forms in use; None for what is not there."""
    parameters = raw.get("rope_parameters")
    scaling = parameters if isinstance(parameters, Mapping) else raw.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise InputError(f"has rope_scaling {shown(scaling)}, which is no mapping.", where=where)
    source = scaling if scaling is not None and "rope_theta" in scaling else raw
    theta = float(number(source, "rope_theta", where)) if source.get("rope_theta") is not None else None
    if theta is not None and theta < 1:
        raise InputError(f"has rope_theta {theta}, which is below 1.", where=where)
    if scaling is None or scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return theta, None
    return theta, scaling


def model_of(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """A model of these fields, or an InputError that says why there is none."""
    from pydantic import ValidationError

    if fields["num_hidden_layers"] > MOST_LAYERS:
        raise InputError(f"has {fields['num_hidden_layers']} layers; {MOST_LAYERS:,} is the limit.", where=where)
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"does not describe a model: {problem['msg']}.", where=where) from None


def shown(value: object) -> str:
    """A value from a file, short and without control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
