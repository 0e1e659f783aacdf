"""What each dimension of each tensor is: the table that growth works from, and that a family adds to.

A dimension belongs to an axis (what grows together) and has a side: `out` units are produced here, `in` units are
consumed here (always the last dimension), `gain` scales them one by one, and `row` stands for itself (a token's row).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from anychip.errors import InputError

Axis = Literal["hidden", "ffn", "queries", "keys", "vocab"]
Side = Literal["out", "in", "gain", "row"]


@dataclass(frozen=True)
class Dim:
    axis: Axis
    side: Side


ROLES: dict[str, tuple[Dim, ...]] = {
    "embed_tokens.weight": (Dim("vocab", "row"), Dim("hidden", "out")),
    "input_layernorm.weight": (Dim("hidden", "gain"),),
    "self_attn.q_proj.weight": (Dim("queries", "out"), Dim("hidden", "in")),
    "self_attn.k_proj.weight": (Dim("keys", "out"), Dim("hidden", "in")),
    "self_attn.v_proj.weight": (Dim("keys", "out"), Dim("hidden", "in")),
    "self_attn.o_proj.weight": (Dim("hidden", "out"), Dim("queries", "in")),
    "self_attn.o_proj.bias": (Dim("hidden", "out"),),
    "post_attention_layernorm.weight": (Dim("hidden", "gain"),),
    "mlp.gate_proj.weight": (Dim("ffn", "out"), Dim("hidden", "in")),
    "mlp.up_proj.weight": (Dim("ffn", "out"), Dim("hidden", "in")),
    "mlp.down_proj.weight": (Dim("hidden", "out"), Dim("ffn", "in")),
    "mlp.down_proj.bias": (Dim("hidden", "out"),),
    "norm.weight": (Dim("hidden", "gain"),),
    "lm_head.weight": (Dim("vocab", "row"), Dim("hidden", "in")),
}
"""By the name's end, without the layer."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def split_layer(name: str) -> tuple[int | None, str]:
    """`layers.3.mlp.up_proj.weight` -> (3, `mlp.up_proj.weight`); (None, name) outside the layers."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


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
