"""A Hugging Face config.json."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found, real_number, whole_number

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_LIKE_OURS = ("telechat", "telechat2", "llama", "mistral", "qwen2", "qwen3", "internlm2", "baichuan")


def from_config(config: dict[str, Any], name: str) -> Found:
    """Names of Llama-like models, and TeleChat's own (n_layer, ffn_hidden_size, ...)."""
    found = Found(name)
    kind = str(config.get("model_type", "")).lower()
    if config.get("kv_lora_rank"):
        found.refuse("latent attention")
    if any(config.get(key) for key in _EXPERTS):
        found.refuse("a mixture of experts")
    if kind not in _LIKE_OURS:
        found.refuse(f"a model of type {kind or 'unknown'!r}")
    if config.get("tie_word_embeddings"):
        found.notes.append("its embedding and head share weights; ours are two matrices")

    def first(*keys: str) -> int | None:
        return next((whole_number(config[key], key) for key in keys if config.get(key) is not None), None)

    heads = first("num_attention_heads", "n_head")
    hidden = first("hidden_size", "n_embd")
    width = first("head_dim")
    if width and heads and hidden and width * heads != hidden:
        found.refuse(f"heads of {width} that do not make up the hidden size {hidden}")
    found.model = {
        "vocab_size": first("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": first("intermediate_size", "ffn_hidden_size"),
        "num_hidden_layers": first("num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": first("num_key_value_heads"),
        "rms_norm_eps": real_number(config.get("rms_norm_eps", config.get("layer_norm_epsilon")), "rms_norm_eps"),
        "rope_theta": real_number(config.get("rope_theta"), "rope_theta"),
        "max_position_embeddings": first("max_position_embeddings", "seq_length"),
    }
    if kind not in ("telechat", "telechat2"):
        found.notes.append("biases are TeleChat2's, on two of a layer's products; this changes no time or memory")
    if config.get("sliding_window"):
        found.notes.append("its sliding window is not taken over: attention is over the whole sequence")
    return found
