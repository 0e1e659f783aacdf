"""One growth: from which model to which, and by which rules. Everything about it follows from this object alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.grow.axes import AxisMap, copied, heads, hidden_channels, identity, padded
from anychip.grow.depth import LayerMap, deepen
from anychip.grow.roles import Axis, Dim, split_layer
from anychip.grow.upcycle import check_upcycling
from anychip.model.arithmetic import num_parameters
from anychip.recipe.schema import GrowthConfig, ModelConfig

CLOSED = 2.0**-64
"""What masked parts are multiplied with at first: no arithmetic of fp64 or less sees them beside anything of ordinary
size, and as a power of two it takes no bit from them."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
_CONTEXT = ("max_position_embeddings", "rope_theta", "rope_scaling", "yarn")
_SCALES = ("input_mult", "output_mult", "mup_scale_factor")
_FREE = ("kv_channels", "preset", "initializer_range")
_EXPERTS = (
    "family", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
    "first_k_dense_replace", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor",
    "router_aux_loss_coef", "router_z_loss_coef", "moe_capacity_factor",
)  # fmt: skip
"""What upcycling sets, which is a growth of its own."""


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
        if layer is None:
            return name
        if self.upcycled(name):
            end = end.replace("mlp.experts.", "mlp.").replace("mlp.shared_experts.", "mlp.")
            end = "mlp.gate_proj.weight" if end.startswith("mlp.gate.") else end
        return f"layers.{self.layers.source[layer]}.{end}"

    def upcycled(self, name: str) -> bool:
        """Whether the tensor is of experts, or their router, that were a plain MLP."""
        _, end = split_layer(name)
        return not self.old.n_routed_experts and end.startswith(("mlp.gate.", "mlp.experts.", "mlp.shared_experts."))

    def factor(self, name: str, dim: Dim, axis: AxisMap) -> float:
        """What the weights of old units are multiplied with, so that muP's multipliers and the rescaled residual stream
        leave the logits alone. The old multipliers are folded into embedding and last gain."""
        embedded = self.old.input_mult / self.new.input_mult
        tied = self.new.tie_word_embeddings
        if dim.side == "out" and dim.axis == "hidden":
            return axis.scale * (embedded if name == "embed_tokens.weight" else 1.0)
        if dim.side == "gain":
            return 1 / axis.scale
        if dim.side == "last_gain":
            logits = self.old.logit_scale / self.new.logit_scale
            # tied, the head has what the embedding was multiplied with, and reads each copy of a channel whole
            return logits / (axis.scale**2 * embedded * float(axis.copies[0])) if tied else logits
        return 1 / axis.scale if name == "lm_head.weight" and dim.axis == "hidden" else 1.0

    def inserted(self, name: str) -> bool:
        """Whether the tensor is of a new layer."""
        layer, _ = split_layer(name)
        return layer is not None and self.layers.inserted[layer]

    def operators(self) -> list[str]:
        """What grows, in words, such as `hidden_size 192 -> 384`."""
        fields = dict.fromkeys((*SIZES, *_CONTEXT, *_SCALES, *_EXPERTS))
        changed = [name for name in fields if getattr(self.old, name) != getattr(self.new, name)]
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
        if self.new.n_routed_experts and not self.old.n_routed_experts:
            return
        pairs = ("num_attention_heads", "num_key_value_heads")
        for names in (pairs, *((name,) for name in SIZES if name not in pairs)):
            only = {name: getattr(self.new, name) for name in names}
            if only == {name: getattr(self.old, name) for name in names}:
                continue
            width = {} if self.old.latent else {"kv_channels": self.old.head_dim}
            new = ModelConfig.model_validate(self.old.model_dump() | width | only)
            layers = self.layers if "num_hidden_layers" in names else _all_layers(self.old.num_hidden_layers)
            yield ", ".join(names), _with_axes(self.old, new, self.mode, self.noise, self.moments, self.seed, layers)


def grown_config(old: ModelConfig, to: dict[str, Any]) -> ModelConfig:
    """The model with the fields of `to`; heads keep their width. Raises InputError for what growth cannot change."""
    allowed = dict.fromkeys((*SIZES, *_CONTEXT, *_SCALES, *_FREE, *_EXPERTS))
    if unknown := [name for name in to if name not in allowed]:
        raise InputError(f"grow cannot change model.{unknown[0]}.", do=f"Allowed: {', '.join(allowed)}.")
    new = ModelConfig.model_validate(old.model_dump() | to)
    changed = [name for name in allowed if getattr(old, name) != getattr(new, name)]
    if new.n_routed_experts and not old.n_routed_experts:
        if others := [name for name in changed if name not in (*_EXPERTS, "preset")]:
            raise InputError(
                f"grow: a dense model becomes one of experts in a growth of its own, and {others[0]} changes too.",
                do="Make two growths of it.",
            )
        check_upcycling(old, new)
    elif frozen := [name for name in changed if name in _EXPERTS and name not in SIZES]:
        raise InputError(f"grow cannot change model.{frozen[0]} of a model with, or without, experts.")
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
    layers = _deepen(old, new, growth.layers, distances)
    return _with_axes(old, new, growth.mode, growth.noise, growth.moments, seed, layers)


def plan_of_record(record: Mapping[str, Any]) -> GrowthPlan:
    """The plan that `as_record` describes."""
    old, new = ModelConfig.model_validate(record["from"]), ModelConfig.model_validate(record["to"])
    layers = LayerMap(tuple(record["layers"]["source"]), tuple(record["layers"]["inserted"]))
    return _with_axes(old, new, record["mode"], record["noise"], record["moments"], record["seed"], layers)


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
    grow_units = copied if copy else padded
    counts = [(config.num_attention_heads, config.num_key_value_heads) for config in (old, new)]
    queries, keys = heads(counts[0], counts[1], copy=copy)
    hidden = hidden_channels(old.hidden_size, new.hidden_size, copy=copy)
    shared = [config.n_shared_experts * config.moe_intermediate_size for config in (old, new)]
    axes: dict[Axis, AxisMap] = {
        "hidden": hidden,
        "hidden_pair": hidden.twice(),
        "ffn": grow_units(old.intermediate_size, new.intermediate_size),
        "moe_ffn": grow_units(old.moe_intermediate_size, new.moe_intermediate_size),
        "shared_ffn": grow_units(shared[0], shared[1]),
        "queries": queries.widened(old.head_dim),
        "keys": keys.widened(old.head_dim),
        "mixed": queries.widened(old.value_dim),
        "latent_heads": queries.widened(old.qk_nope_head_dim + old.v_head_dim),
        "q_latent": identity(old.q_lora_rank),
        "kv_latent": identity(old.kv_lora_rank),
        "kv_latent_rope": identity(old.kv_lora_rank + old.qk_rope_head_dim),
        "experts": identity(old.n_routed_experts),
        "vocab": padded(old.vocab_size, new.vocab_size),
    }
    return GrowthPlan(old, new, mode, noise, moments, seed, layers, axes)


def _deepen(old: ModelConfig, new: ModelConfig, where: str, distances: Sequence[float] | None) -> LayerMap:
    """Dense layers before those with experts stay as they are."""
    dense = old.first_k_dense_replace if old.n_routed_experts else 0
    rest = deepen(old.num_hidden_layers - dense, new.num_hidden_layers - dense, where, distances and distances[dense:])
    return LayerMap((*range(dense), *(source + dense for source in rest.source)), (False,) * dense + rest.inserted)


def _all_layers(number: int) -> LayerMap:
    return LayerMap(tuple(range(number)), (False,) * number)


def _short(value: Any) -> Any:
    return value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value
