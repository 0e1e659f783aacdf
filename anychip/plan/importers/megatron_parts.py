"""Experts, latent attention and scaled rotary positions in the arguments of Megatron-LM and MindSpeed.

Where the two have different names for one thing both are read, Megatron's first.
"""

from __future__ import annotations

import re
from typing import Any

from anychip.errors import InputError
from anychip.plan.importers.arguments import Arguments
from anychip.plan.importers.found import Found
from anychip.plan.importers.parts import MOST_LAYERS, dense_first, experts, from_on, latent_attention

_PATTERN = re.compile(r"\[([01](?:,[01])*)\](?:\*(\d+))?")


def experts_of(found: Found, arguments: Arguments, layers: int | None) -> dict[str, Any]:
    """Fields of `model`; none for a dense model."""
    count = arguments.number("num-experts") if arguments.text("num-experts") != "true" else None
    if not count or count == 1:
        return {}
    inner = arguments.number("moe-ffn-hidden-size", "moe-intermediate-size", "ffn-hidden-size")
    shared = arguments.number("moe-shared-expert-intermediate-size")
    if shared is None:
        shared = (arguments.number("n-shared-experts") or 0) * (inner or 0)
    sigmoid = arguments.text("moe-router-score-function") == "sigmoid"
    balancing = arguments.text("moe-router-load-balancing-type")
    return experts(
        found,
        count=count,
        chosen=arguments.number("moe-router-topk") or 2,
        inner=inner,
        shared_inner=shared,
        dense_first=dense_first(found, _which_have_experts(arguments, layers or 0)),
        sigmoid=sigmoid,
        ranking_bias="moe-router-enable-expert-bias" in arguments or balancing == "noaux_tc",
        # The softmax is over the chosen ones, unless it is asked for before the choice.
        renormalised=sigmoid or "norm-topk-prob" in arguments or "moe-router-pre-softmax" not in arguments,
        scaling=arguments.real("moe-router-topk-scaling-factor", "routed-scaling-factor"),
        balance_loss=arguments.real("moe-aux-loss-coeff"),
        z_loss=arguments.real("moe-z-loss-coeff"),
        capacity=arguments.real("moe-expert-capacity-factor"),
        groups=arguments.number("moe-router-num-groups", "n-group"),
    )


def _which_have_experts(arguments: Arguments, layers: int) -> list[bool]:
    """`--moe-layer-freq` is a step, or a list such as [0]*3+[1]*58; `--first-k-dense-replace` is MindSpeed's."""
    frequency = re.sub(r"[\s'\"()]", "", arguments.text("moe-layer-freq", "1"))
    if frequency.isdecimal() and len(frequency) < 9 and int(frequency) > 0:
        first = arguments.number("first-k-dense-replace") or 0
        return from_on(first, int(frequency), layers)
    parts = [_PATTERN.fullmatch(part) for part in frequency.split("+")]
    listed: list[bool] = []
    for part in parts:
        if part is None or len(part[2] or "") > 5 or len(part[1]) * int(part[2] or 1) > 2 * MOST_LAYERS:
            raise InputError(
                f"--moe-layer-freq is {frequency[:80]!r}, which is no list of 0 and 1.", do="Write it out."
            )
        listed += [digit == "1" for digit in part[1].split(",")] * int(part[2] or 1)
    return listed


def latent_of(arguments: Arguments) -> dict[str, Any]:
    """Fields of `model`; none for plain attention. Widths left out are Megatron's defaults."""
    if "multi-latent-attention" not in arguments and "multi-head-latent-attention" not in arguments:
        return {}
    return latent_attention(
        heads=arguments.number("num-attention-heads"),
        q_rank=arguments.number("q-lora-rank"),
        kv_rank=arguments.number("kv-lora-rank") or 32,
        nope=arguments.number("qk-head-dim", "qk-nope-head-dim") or 128,
        rope=arguments.number("qk-pos-emb-head-dim", "qk-rope-head-dim") or 64,
        value=arguments.number("v-head-dim") or 128,
    ) | {"kv_channels": None}


def yarn_of(found: Found, arguments: Arguments) -> dict[str, Any]:
    """The field `yarn` of `model`, from MindSpeed's names."""
    factor = arguments.real("rope-scaling-factor")
    original = arguments.number("rope-scaling-original-max-position-embeddings")
    if arguments.text("rope-scaling-type") == "yarn" and factor and original:
        scale = arguments.real("rope-scaling-mscale-all-dim")
        values = {
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": arguments.real("rope-scaling-beta-fast"),
            "beta_slow": arguments.real("rope-scaling-beta-slow"),
            "mscale": None if scale is None else 0.1 * scale,
        }
        return {"yarn": {name: value for name, value in values.items() if value is not None}}
    if any(name in arguments for name in ("rope-scaling-type", "rotary-scaling-factor", "use-rope-scaling")):
        found.notes.append("its scaling of rotary positions is not taken over")
    return {}
