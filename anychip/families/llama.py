"""The layout of Llama and Mixtral: TeleChat3's and Tele-FLM's dense models have it under other names of architecture,
and what a program without remote code can run of the other families is exported in it. No tensors here.

A bias that Llama has and a model has not is exported as zeros. muP multipliers, which Llama has not, go into the
weights they act on: the embedding, and the output head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from anychip.errors import InputError
from anychip.families.json_fields import Field, fields_of, model_of, number, rope_of, shown
from anychip.families.published import PublishedTensor
from anychip.recipe.schema import ModelConfig

# family -> (architecture, model_type)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mixtral": ("MixtralForCausalLM", "mixtral"),
    "telechat3": ("Telechat3ForCausalLM", "telechat3"),
    "teleflm": ("TeleFLMForCausalLM", "teleflm"),
}
TELECHAT3_MSCALE = 0.07
_FIELDS = (
    Field("vocab_size"),
    Field("hidden_size"),
    Field("intermediate_size"),
    Field("num_hidden_layers"),
    Field("num_attention_heads"),
    Field("num_key_value_heads", optional=True),
    Field("rms_norm_eps", optional=True),
    Field("max_position_embeddings", optional=True),
    Field("initializer_range", optional=True),
    Field("kv_channels", "head_dim", optional=True),
)


def check_plain(config: ModelConfig, dtype: str) -> None:
    """Raises InputError where neither Llama nor Mixtral computes what this model computes."""
    wrong = ""
    if config.latent:
        wrong = "has latent attention"
    elif config.n_routed_experts and (
        config.biases != "none"
        or config.scoring_func != "softmax"
        or config.topk_method != "greedy"
        or not config.norm_topk_prob
        or config.routed_scaling_factor != 1.0
        or config.n_shared_experts
        or config.first_k_dense_replace
        or config.moe_intermediate_size != config.intermediate_size
    ):
        wrong = "has experts of another kind than Mixtral's"
    elif config.rope_scaling is not None and config.max_position_embeddings > _plain_length(config):
        wrong = f"scales its rotary positions beyond {_plain_length(config)} tokens"
    elif dtype != "float32" and any(math.frexp(f)[0] != 0.5 for f in (config.input_mult, config.logit_scale)):
        wrong = f"has muP multipliers that {dtype} weights cannot take in exactly"
    if wrong:
        raise InputError(
            f"export.layout llama: the model {wrong}, which the Llama layout cannot say.",
            do="Set export.layout=family, model.max_position_embeddings to what is plain, or export.dtype=fp32.",
        )


def _plain_length(config: ModelConfig) -> int:
    """Tokens up to which TeleChat2's dynamic rule does nothing."""
    assert config.rope_scaling is not None
    return min(config.rope_scaling.training_length, config.rope_scaling.base_length)


def published_tensors(config: ModelConfig, *, plain: bool) -> Iterator[PublishedTensor]:
    """Every tensor in the order of the forward pass. plain: as Llama and Mixtral themselves have them."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    biases = plain and config.biases == "telechat2"
    embed = config.input_mult if plain else 1.0
    yield PublishedTensor(
        "model.embed_tokens.weight", (config.vocab_size, hidden), ("embed_tokens.weight",), factor=embed
    )
    for layer in range(config.num_hidden_layers):
        to, of = f"model.layers.{layer}", f"layers.{layer}"
        yield PublishedTensor(f"{to}.input_layernorm.weight", (hidden,), (f"{of}.input_layernorm.weight",))
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
        ):
            yield from _linear(to, of, name, rows, columns, biases)
        yield PublishedTensor(
            f"{to}.post_attention_layernorm.weight", (hidden,), (f"{of}.post_attention_layernorm.weight",)
        )
        if config.has_experts(layer):
            yield from _mixtral_experts(config, to, of)
            continue
        for name, rows, columns in (
            ("mlp.gate_proj", config.intermediate_size, hidden),
            ("mlp.up_proj", config.intermediate_size, hidden),
            ("mlp.down_proj", hidden, config.intermediate_size),
        ):
            yield from _linear(to, of, name, rows, columns, biases)
    yield PublishedTensor("model.norm.weight", (hidden,), ("norm.weight",))
    scale = config.logit_scale if plain else 1.0
    tied = config.tie_word_embeddings
    if not tied or scale != embed:
        name = "embed_tokens.weight" if tied else "lm_head.weight"
        yield PublishedTensor("lm_head.weight", (config.vocab_size, hidden), (name,), factor=scale, repeats=tied)


def _linear(to: str, of: str, name: str, rows: int, columns: int, biases: bool) -> Iterator[PublishedTensor]:
    yield PublishedTensor(f"{to}.{name}.weight", (rows, columns), (f"{of}.{name}.weight",))
    if biases:
        own = name.endswith(("o_proj", "down_proj"))
        yield PublishedTensor(f"{to}.{name}.bias", (rows,), (f"{of}.{name}.bias",) if own else ())


def _mixtral_experts(config: ModelConfig, to: str, of: str) -> Iterator[PublishedTensor]:
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield PublishedTensor(f"{to}.block_sparse_moe.gate.weight", (count, hidden), (f"{of}.mlp.gate.weight",))
    for short, name, shape in (
        ("w1", "gate_proj", (inner, hidden)),
        ("w3", "up_proj", (inner, hidden)),
        ("w2", "down_proj", (hidden, inner)),
    ):
        for expert in range(count):
            yield PublishedTensor(
                f"{to}.block_sparse_moe.experts.{expert}.{short}.weight",
                shape,
                (f"{of}.mlp.experts.{name}.weight",),
                expert,
            )


def config_to_json(config: ModelConfig, *, plain: bool) -> dict[str, Any]:
    """The fields of config.json that say what the model is."""
    family = ("mixtral" if config.n_routed_experts else "llama") if plain or config.family == "llama" else config.family
    architecture, kind = ARCHITECTURES[family]
    biases = plain and config.biases == "telechat2"
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _yarn(config, family),
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": biases,
        "mlp_bias": biases,
        "tie_word_embeddings": config.tie_word_embeddings and (not plain or config.logit_scale == config.input_mult),
    }
    if family == "teleflm":
        raw |= {
            "use_mup": True,
            "input_mult": config.input_mult,
            "output_mult": config.output_mult,
            "mup_scale_factor": config.mup_scale_factor,
        }
    if config.n_routed_experts:
        raw |= {
            "num_local_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    return raw


def _yarn(config: ModelConfig, family: str) -> dict[str, Any] | None:
    yarn = config.yarn
    if yarn is None:
        return None
    kind = "telechat3-yarn" if family == "telechat3" and yarn.mscale == TELECHAT3_MSCALE else "yarn"
    return {
        "rope_type": kind,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "attention_factor": yarn.mscale * math.log(yarn.factor) + 1,
    }


def config_from_json(raw: Mapping[str, Any], family: str, where: str) -> ModelConfig:
    """A model from a published config.json of this family (a key of ARCHITECTURES). Raises InputError for what this
    decoder does not compute."""
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise InputError(f"sets {flag}; models of this layout are read without biases.", where=where)
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise InputError("has a sliding window, which this decoder does not compute.", where=where)
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"has hidden_act {shown(raw['hidden_act'])}; only silu is computed.", where=where)
    fields = fields_of(raw, _FIELDS, where)
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if fields.get("kv_channels") == fields["hidden_size"] // fields["num_attention_heads"]:
        del fields["kv_channels"]
    theta, scaling = rope_of(raw, where)
    if theta is not None:
        fields["rope_theta"] = theta
    if scaling is not None:
        fields["yarn"] = yarn_of(scaling, where)
    fields |= {"biases": "none", "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False))}
    if family == "teleflm":
        for name in ("input_mult", "output_mult", "mup_scale_factor"):
            fields[name] = float(number(raw, name, where, default=1.0))
    if family == "mixtral":
        fields |= {
            "n_routed_experts": int(number(raw, "num_local_experts", where)),
            "num_experts_per_tok": int(number(raw, "num_experts_per_tok", where)),
            "moe_intermediate_size": fields["intermediate_size"],
        }
    return model_of({**fields, "family": "llama" if family == "mixtral" else family}, where)


def yarn_of(scaling: Mapping[str, Any], where: str) -> dict[str, float]:
    """The fields of `model.yarn` from a published rope_scaling of type yarn or telechat3-yarn."""
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("yarn", "telechat3-yarn"):
        raise InputError(f"has rope_scaling {shown(dict(scaling))}; only yarn is computed here.", where=where)
    factor = float(number(scaling, "factor", where))
    mscale = TELECHAT3_MSCALE if kind == "telechat3-yarn" else 0.1
    if (given := scaling.get("mscale_all_dim")) and given == scaling.get("mscale"):
        mscale = 0.1 * float(given)
    elif scaling.get("attention_factor") and factor > 1:
        mscale = round((float(number(scaling, "attention_factor", where)) - 1) / math.log(factor), 12)
    return {
        "factor": factor,
        "original_max_position_embeddings": int(number(scaling, "original_max_position_embeddings", where)),
        "beta_fast": float(number(scaling, "beta_fast", where, default=32.0)),
        "beta_slow": float(number(scaling, "beta_slow", where, default=1.0)),
        "mscale": mscale,
    }
