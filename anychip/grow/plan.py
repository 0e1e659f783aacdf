"""One growth: from which model to which, and by which rules. Everything about it follows from this object alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.grow.axes import AxisMap, copied, heads, hidden_channels, padded
from anychip.grow.depth import LayerMap, deepen
from anychip.grow.roles import Axis, split_layer
from anychip.model.arithmetic import num_parameters
from anychip.recipe.schema import GrowthConfig, ModelConfig

CLOSED = 2.0**-64
"""What masked parts are multiplied with at first: no arithmetic of fp64 or less sees them beside anything of ordinary
size, and as a power of two it takes no bit from them."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
_CONTEXT = ("max_position_embeddings", "rope_theta", "rope_scaling")
_FREE = ("kv_channels", "preset", "initializer_range")


@dataclass(frozen=True)
class GrowthPlan:
    """`old` and `new` shapes and the rules between them. `seed` and the tensors' names decide all chance."""

    old: ModelConfig
    new: ModelConfig
    mode: Literal["immediate", "masked"]
    noise: float
    moments: Literal["map", "reset"]
    seed: int
    layers: LayerMap
    axes: dict[Axis, AxisMap] = field(compare=False)

    @property
    def closed(self) -> float:
        """What the closed side of fresh units is multiplied with."""
        return CLOSED if self.mode == "masked" else 0.0

    def parent_of(self, name: str) -> str:
        """The old tensor that a new one is made from."""
        layer, end = split_layer(name)
        return name if layer is None else f"layers.{self.layers.source[layer]}.{end}"

    def inserted(self, name: str) -> bool:
        """Whether the tensor is of a new layer."""
        layer, _ = split_layer(name)
        return layer is not None and self.layers.inserted[layer]

    def operators(self) -> list[str]:
        """What grows, in words, such as `hidden_size 192 -> 384`."""
        changed = [name for name in (*SIZES, *_CONTEXT) if getattr(self.old, name) != getattr(self.new, name)]
        return [f"{name} {_short(getattr(self.old, name))} -> {_short(getattr(self.new, name))}" for name in changed]

    def as_record(self) -> dict[str, Any]:
        """For lineage: enough to make the same plan again."""
        return {
            "from": self.old.model_dump(mode="json"),
            "to": self.new.model_dump(mode="json"),
            "operators": self.operators(),
            "mode": self.mode,
            "noise": self.noise,
            "moments": self.moments,
            "seed": self.seed,
            "layers": {key: list(value) for key, value in asdict(self.layers).items()},
            "parameters": [num_parameters(self.old), num_parameters(self.new)],
        }

    @property
    def identity(self) -> str:
        """Digest of all that decides the grown tensors."""
        return sha256_json(self.as_record())

    def one_by_one(self) -> Iterator[tuple[str, GrowthPlan]]:
        """The same growth with one operator alone, for each operator that is in it."""
        pairs = ("num_attention_heads", "num_key_value_heads")
        for names in (pairs, *((name,) for name in SIZES if name not in pairs)):
            only = {name: getattr(self.new, name) for name in names}
            if only == {name: getattr(self.old, name) for name in names}:
                continue
            new = ModelConfig.model_validate(self.old.model_dump() | {"kv_channels": self.old.head_dim} | only)
            layers = self.layers if "num_hidden_layers" in names else _all_layers(self.old.num_hidden_layers)
            yield ", ".join(names), _with_axes(self.old, new, self.mode, self.noise, self.moments, self.seed, layers)


def grown_config(old: ModelConfig, to: dict[str, Any]) -> ModelConfig:
    """The model with the fields of `to`; heads keep their width. Raises InputError for what growth cannot change."""
    if unknown := [name for name in to if name not in (*SIZES, *_CONTEXT, *_FREE)]:
        raise InputError(
            f"grow cannot change model.{unknown[0]}.", do=f"Allowed: {', '.join((*SIZES, *_CONTEXT, *_FREE))}."
        )
    new = ModelConfig.model_validate(old.model_dump() | to)
    for name in SIZES:
        if getattr(new, name) < getattr(old, name):
            raise InputError(f"grow: {name} {getattr(old, name)} cannot shrink to {getattr(new, name)}.")
    if new.head_dim != old.head_dim:
        raise InputError(
            f"grow: heads are {old.head_dim} wide and would become {new.head_dim}: growth adds heads, it keeps their "
            "width.",
            do="Let num_attention_heads grow as hidden_size does, or set kv_channels.",
        )
    return new


def plan_growth(
    old: ModelConfig, growth: GrowthConfig, seed: int, distances: Sequence[float] | None = None
) -> GrowthPlan:
    """The plan of a recipe's growth step. `distances` [old layers] are needed where layers stand by distance."""
    new = grown_config(old, dict(growth.to))
    layers = deepen(old.num_hidden_layers, new.num_hidden_layers, growth.layers, distances)
    return _with_axes(old, new, growth.mode, growth.noise, growth.moments, seed, layers)


def _with_axes(
    old: ModelConfig,
    new: ModelConfig,
    mode: Literal["immediate", "masked"],
    noise: float,
    moments: Literal["map", "reset"],
    seed: int,
    layers: LayerMap,
) -> GrowthPlan:
    copy = mode == "immediate"
    numbers = [(config.num_attention_heads, config.num_key_value_heads) for config in (old, new)]
    queries, keys = heads(numbers[0], numbers[1], copy=copy)
    grow_units = copied if copy else padded
    axes: dict[Axis, AxisMap] = {
        "hidden": hidden_channels(old.hidden_size, new.hidden_size, copy=copy),
        "ffn": grow_units(old.intermediate_size, new.intermediate_size),
        "queries": queries.widened(old.head_dim),
        "keys": keys.widened(old.head_dim),
        "vocab": padded(old.vocab_size, new.vocab_size),
    }
    return GrowthPlan(old, new, mode, noise, moments, seed, layers, axes)


def _all_layers(number: int) -> LayerMap:
    return LayerMap(tuple(range(number)), (False,) * number)


def _short(value: Any) -> Any:
    return value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value
