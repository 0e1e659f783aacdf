"""What each dimension of each tensor is: the table that growth works from, and that a family adds to.

A dimension belongs to an axis (what grows together) and has a side: `out` units are produced here, `in` units are
consumed here (always the last dimension), `gain` scales them one by one (`last_gain`: before the head), and `row`
stands for itself (a token's or an expert's).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from anychip.errors import InputError

Axis = Literal[
    "hidden", "hidden_pair", "ffn", "moe_ffn", "shared_ffn", "queries", "keys", "mixed", "latent_heads",
    "q_latent", "kv_latent", "kv_latent_rope", "experts", "vocab",
]  # fmt: skip
"""queries, keys: rows of heads; mixed: what attention gives, by query head; latent_heads: a head's key and value made
from the latent; hidden_pair: two hidden vectors side by side."""
Side = Literal["out", "in", "gain", "last_gain", "row"]


@dataclass(frozen=True)
class Dim:
    axis: Axis
    side: Side


def _mlp(prefix: str, ffn: Axis, *lead: Dim) -> dict[str, tuple[Dim, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (*lead, Dim(ffn, "out"), Dim("hidden", "in")),
        f"{prefix}.up_proj.weight": (*lead, Dim(ffn, "out"), Dim("hidden", "in")),
        f"{prefix}.down_proj.weight": (*lead, Dim("hidden", "out"), Dim(ffn, "in")),
        f"{prefix}.down_proj.bias": (*lead, Dim("hidden", "out")),
    }


_GAIN = (Dim("hidden", "gain"),)
_LAST = (Dim("hidden", "last_gain"),)

ROLES: dict[str, tuple[Dim, ...]] = {
    "embed_tokens.weight": (Dim("vocab", "row"), Dim("hidden", "out")),
    "input_layernorm.weight": _GAIN,
    "self_attn.q_proj.weight": (Dim("queries", "out"), Dim("hidden", "in")),
    "self_attn.k_proj.weight": (Dim("keys", "out"), Dim("hidden", "in")),
    "self_attn.v_proj.weight": (Dim("keys", "out"), Dim("hidden", "in")),
    "self_attn.o_proj.weight": (Dim("hidden", "out"), Dim("mixed", "in")),
    "self_attn.o_proj.bias": (Dim("hidden", "out"),),
    # latent attention
    "self_attn.q_a_proj.weight": (Dim("q_latent", "out"), Dim("hidden", "in")),
    "self_attn.q_a_layernorm.weight": (Dim("q_latent", "row"),),
    "self_attn.q_b_proj.weight": (Dim("queries", "out"), Dim("q_latent", "in")),
    "self_attn.kv_a_proj_with_mqa.weight": (Dim("kv_latent_rope", "out"), Dim("hidden", "in")),
    "self_attn.kv_a_layernorm.weight": (Dim("kv_latent", "row"),),
    "self_attn.kv_b_proj.weight": (Dim("latent_heads", "out"), Dim("kv_latent", "in")),
    "post_attention_layernorm.weight": _GAIN,
    **_mlp("mlp", "ffn"),
    # experts
    "mlp.gate.weight": (Dim("experts", "row"), Dim("hidden", "in")),
    "mlp.gate.e_score_correction_bias": (Dim("experts", "row"),),
    **_mlp("mlp.experts", "moe_ffn", Dim("experts", "row")),
    **_mlp("mlp.shared_experts", "shared_ffn"),
    # modules for further tokens
    "enorm.weight": _GAIN,
    "hnorm.weight": _GAIN,
    "eh_proj.weight": (Dim("hidden", "out"), Dim("hidden_pair", "in")),
    "norm.weight": _LAST,
    "lm_head.weight": (Dim("vocab", "row"), Dim("hidden", "in")),
}
"""By the name's end, without the layer."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_FURTHER = re.compile(r"mtp\.\d+\.(?:layer\.)?(.+)")


def split_layer(name: str) -> tuple[int | None, str]:
    """`layers.3.mlp.up_proj.weight` -> (3, `mlp.up_proj.weight`); None for the layer of a tensor elsewhere."""
    match = _LAYER.fullmatch(name)
    if match:
        return int(match[1]), match[2]
    further = _FURTHER.fullmatch(name)
    return None, further[1] if further else name


def roles_of(name: str) -> tuple[Dim, ...]:
    """The dimensions of a parameter. Raises InputError for one that growth knows nothing of."""
    end = split_layer(name)[1]
    if end not in ROLES:
        raise InputError(f"growth has no rule for the tensor {name}.", do="Add it to anychip/grow/roles.py.")
    return ROLES[end]


def writes_residual(name: str) -> bool:
    """Whether a layer's tensor writes into the residual stream: closed, the layer is the identity."""
    layer, end = split_layer(name)
    return layer is not None and Dim("hidden", "out") in ROLES[end]
