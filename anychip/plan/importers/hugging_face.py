"""A Hugging Face config.json."""

from __future__ import annotations

from typing import Any

from anychip.errors import InputError
from anychip.families.json_fields import rope_of
from anychip.families.llama import yarn_of
from anychip.plan.importers.found import Found, real_number, whole_number
from anychip.plan.importers.parts import MOST_LAYERS, dense_first, experts, from_on, latent_attention, without_biases

_TELECHAT = ("telechat", "telechat2")
_DENSE = (*_TELECHAT, "telechat3", "llama", "mistral", "qwen2", "qwen3", "internlm2", "baichuan")
_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "kimi_k2")
_WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", *_DEEPSEEK)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What such models have and ours do not: it changes what is learned, hardly time or memory.
_LEFT_OUT = {
    "qwen2": "biases of queries, keys and values",
    "qwen2_moe": "biases of queries, keys and values, and the gate of the shared expert",
    "qwen3": "norms of queries and keys",
    "qwen3_moe": "norms of queries and keys",
}


def from_config(config: dict[str, Any], name: str) -> Found:
    """Names of Llama-, Mixtral-, Qwen- and DeepSeek-like models, and TeleChat's own (n_layer, ffn_hidden_size, ...)."""
    found = Found(name)
    kind = str(config.get("model_type", "")).lower()
    if kind not in (*_DENSE, *_WITH_EXPERTS):
        found.refuse(f"a model of type {kind or 'unknown'!r}")
    found.model = _shape(found, config) | _positions(found, config)
    count = _first(config, *_EXPERTS)
    if kind in _DEEPSEEK or config.get("kv_lora_rank"):
        found.model |= _latent(found, config)
    if count and kind in _WITH_EXPERTS:
        found.model |= _experts(found, config, kind, count)
    elif count:
        found.refuse(f"a mixture of experts in a model of type {kind!r}")
    if kind not in _TELECHAT:
        found.model |= without_biases(found.model)
    if kind in _LEFT_OUT:
        found.notes.append(f"its {_LEFT_OUT[kind]} are left out")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        found.notes.append("its sliding window is not taken over: attention is over the whole sequence")
    return found


def _first(config: dict[str, Any], *keys: str) -> int | None:
    return next((whole_number(config[key], key) for key in keys if config.get(key) is not None), None)


def _shape(found: Found, config: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = _first(config, "num_attention_heads", "n_head"), _first(config, "hidden_size", "n_embd")
    width = _first(config, "head_dim")
    return {
        "vocab_size": _first(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _first(config, "intermediate_size", "ffn_hidden_size"),
        "num_hidden_layers": _first(config, "num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": _first(config, "num_key_value_heads"),
        "kv_channels": width if width and heads and hidden and width * heads != hidden else None,
        "rms_norm_eps": real_number(config.get("rms_norm_eps", config.get("layer_norm_epsilon")), "rms_norm_eps"),
        "max_position_embeddings": _first(config, "max_position_embeddings", "seq_length"),
        "tie_word_embeddings": True if config.get("tie_word_embeddings") is True else None,
    }


def _positions(found: Found, config: dict[str, Any]) -> dict[str, Any]:
    theta, scaling = rope_of(config, "")
    kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if scaling is not None and kind == "yarn":
        try:
            return {"rope_theta": theta, "yarn": yarn_of(scaling, "")}
        except (TypeError, ValueError):
            raise InputError("has a rope_scaling whose values are no numbers.", do="Correct it.") from None
    if scaling is not None:
        found.notes.append(f"its scaling of rotary positions ({str(kind)[:20]}) is not taken over")
    return {"rope_theta": theta}


def _latent(found: Found, config: dict[str, Any]) -> dict[str, Any]:
    rank = _first(config, "kv_lora_rank")
    if not rank:
        found.refuse("latent attention without kv_lora_rank")
    return latent_attention(
        heads=_first(config, "num_attention_heads"),
        q_rank=_first(config, "q_lora_rank"),
        kv_rank=rank,
        nope=_first(config, "qk_nope_head_dim"),
        rope=_first(config, "qk_rope_head_dim"),
        value=_first(config, "v_head_dim"),
    ) | {"kv_channels": None}  # DeepSeek's head_dim is the width that turns with position


def _experts(found: Found, config: dict[str, Any], kind: str, count: int) -> dict[str, Any]:
    mixtral, deepseek = kind == "mixtral", kind in _DEEPSEEK
    third = kind in ("deepseek_v3", "kimi_k2")  # of whose router transformers' own files say nothing
    inner = _first(config, "intermediate_size") if mixtral else _first(config, "moe_intermediate_size")
    shared = (_first(config, "n_shared_experts") or 0) * (inner or 0)
    return experts(
        found,
        count=count,
        chosen=_first(config, "num_experts_per_tok"),
        inner=inner,
        shared_inner=_first(config, "shared_expert_intermediate_size") or shared,
        dense_first=dense_first(found, _which_have_experts(config)),
        sigmoid=config.get("scoring_func", "sigmoid" if third else "softmax") == "sigmoid",
        ranking_bias=config.get("topk_method", "noaux_tc" if third else "greedy") == "noaux_tc",
        renormalised=mixtral or config.get("norm_topk_prob", third) is True,
        scaling=real_number(config.get("routed_scaling_factor"), "routed_scaling_factor"),
        balance_loss=real_number(
            config.get("aux_loss_alpha" if deepseek else "router_aux_loss_coef"), "weight of the balance loss"
        ),
        groups=_first(config, "n_group"),
    ) | {"num_nextn_predict_layers": _first(config, "num_nextn_predict_layers")}


def _which_have_experts(config: dict[str, Any]) -> list[bool]:
    """By layer: the first ones may be plain (DeepSeek), others by a step or a list (Qwen)."""
    layers = min(_first(config, "num_hidden_layers") or 0, MOST_LAYERS)
    plain = config.get("mlp_only_layers") or []
    listed = set(plain) if isinstance(plain, list) and all(isinstance(layer, int) for layer in plain) else set()
    step = _first(config, "decoder_sparse_step", "moe_layer_freq") or 1
    first = _first(config, "first_k_dense_replace") or 0
    if step < 1:
        step = 1
    if "decoder_sparse_step" in config:
        return [layer not in listed and (layer + 1) % step == 0 for layer in range(layers)]
    return from_on(first, step, layers)
