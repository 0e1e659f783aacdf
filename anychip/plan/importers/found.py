"""What an importer found in a foreign file, and the recipe that it makes."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any, NoReturn

from anychip.errors import InputError
from anychip.recipe.load import parse_recipe


@dataclass
class Found:
    """Values under our names; None: the source does not say. `notes` say what changed its meaning or was left out."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, what: str) -> NoReturn:
        """A model that recipes cannot describe."""
        raise InputError(
            f"describes {what}, which a recipe cannot.",
            do="Recipes describe decoders with RMSNorm, SwiGLU and rotary positions, with grouped-query or latent "
            "attention, and experts in every layer after the first few.",
        )


@dataclass(frozen=True)
class Imported:
    """A recipe as plain values, valid for `load_recipe`, and what a person should know of it."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]


def imported(found: Found, where: str) -> Imported:
    """Check the values against the schema. Raises InputError naming what is missing or wrong."""
    model = {name: value for name, value in found.model.items() if value is not None}
    if "moe_intermediate_size" in model:  # a model of which no layer is plain need not say how wide one would be
        model.setdefault("intermediate_size", model["moe_intermediate_size"])
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if name not in model]:
        raise InputError(f"does not say {', '.join(missing)}.", where=where, do="Give the file that holds the model.")
    model.setdefault("num_key_value_heads", model["num_attention_heads"])
    training = {name: value for name, value in found.training.items() if value is not None}
    defaults = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 1024, "steps": 1000}
    for name, value in defaults.items():
        if name not in training:
            training[name] = value
            found.notes.append(f"training.{name} is not in the source; {value} was taken")
    model.setdefault("max_position_embeddings", max(training["seq_length"], 8192))
    if model["max_position_embeddings"] < training["seq_length"]:
        model["max_position_embeddings"] = training["seq_length"]
    recipe: dict[str, Any] = {
        "schema_version": 1,
        "name": found.name,
        "model": model,
        "data": {"sources": [{"name": "corpus", "path": "corpus/packed", "format": "megatron"}]},
        "training": training,
    }
    if parallel := {name: value for name, value in found.parallel.items() if value not in (None, 1)}:
        recipe["parallel"] = parallel
    if model.get("num_nextn_predict_layers") and found.parallel.get("pipeline_parallel", 1) not in (None, 1):
        found.notes.append("modules for further tokens do not go through a pipeline: set one of the two to none")
    if optimizer := {name: value for name, value in found.optimizer.items() if value is not None}:
        recipe["optimizer"] = optimizer
    parse_recipe(recipe, where)
    return Imported(recipe, ("data.sources names a corpus to be replaced by yours", *found.notes))


def whole_number(value: Any, name: str) -> int | None:
    """An integer, or a refusal that names the setting."""
    if value is None:
        return None
    try:
        number = float(value)
        if isinstance(value, bool) or not number.is_integer():
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{name} is {reprlib.repr(value)}, which is no whole number.", do="Correct it in the source."
        ) from None


def real_number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{name} is {reprlib.repr(value)}, which is no number.", do="Correct it in the source."
        ) from None
