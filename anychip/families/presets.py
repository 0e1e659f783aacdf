"""Published shapes by preset name, as fields of the recipe's `model` section."""

from __future__ import annotations

from typing import Any

_TELECHAT2: dict[str, Any] = {
    "family": "telechat2",
    "vocab_size": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": {"base_length": 8192, "training_length": 8192},
    "max_position_embeddings": 32_768,
    "initializer_range": 0.0048,
}

_TELECHAT3: dict[str, Any] = {
    "vocab_size": 131_072,
    "biases": "none",
    "rms_norm_eps": 1e-5,
}

_TELE_FLM: dict[str, Any] = {
    "family": "teleflm",
    "biases": "none",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}

# TeleChat3-105B-A4.7B's attention and router; what its sizes are is said where they are used.
_DEEPSEEK_LIKE: dict[str, Any] = {
    **_TELECHAT3,
    "family": "telechat3-moe",
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "initializer_range": 0.01,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.8,
    "router_aux_loss_coef": 0.001,
    "router_bias_update_rate": 0.001,
    "num_nextn_predict_layers": 1,
    "mtp_loss_scaling_factor": 0.2,
}

PRESETS: dict[str, dict[str, Any]] = {
    "telechat2-3b": {
        **_TELECHAT2,
        "hidden_size": 3072,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
    },
    "telechat2-7b": {
        **_TELECHAT2,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "telechat2-35b": {
        **_TELECHAT2,
        "hidden_size": 6144,
        "intermediate_size": 20_480,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 48,
    },
    "telechat2-115b": {
        **_TELECHAT2,
        "max_position_embeddings": 8192,
        "hidden_size": 8192,
        "intermediate_size": 40_960,
        "num_hidden_layers": 96,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "telechat2-39b-a12b": {
        **_TELECHAT2,
        "family": "telechat2-moe",
        "hidden_size": 4096,
        "intermediate_size": 6144,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 6144,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    },
    "telechat3-36b": {
        **_TELECHAT3,
        "family": "telechat3",
        "hidden_size": 6144,
        "intermediate_size": 24_576,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0,
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192, "mscale": 0.07},
        "max_position_embeddings": 32_768,
        "initializer_range": 0.0048,
    },
    "telechat3-105b-a4.7b": {
        **_DEEPSEEK_LIKE,
        "hidden_size": 2560,
        "intermediate_size": 7680,
        "num_hidden_layers": 45,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_routed_experts": 192,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1,
    },
    # Sized by us after the 105B, because the published one's shape is not known: docs/en/experts.md says how.
    "moe-1t-a30b": {
        **_DEEPSEEK_LIKE,
        "hidden_size": 5120,
        "intermediate_size": 15_360,
        "num_hidden_layers": 56,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 3072,
        "first_k_dense_replace": 1,
    },
    "tele-flm-52b": {
        **_TELE_FLM,
        "vocab_size": 80_384,
        "hidden_size": 8192,
        "intermediate_size": 21_824,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "output_mult": 0.5,
        "mup_scale_factor": 16.0,
    },
    "tele-flm-1t": {
        **_TELE_FLM,
        "vocab_size": 81_920,
        "hidden_size": 20_480,
        "intermediate_size": 98_304,
        "num_hidden_layers": 140,
        "num_attention_heads": 160,
        "num_key_value_heads": 160,
        "output_mult": 2.0,
        "mup_scale_factor": 80.0,
    },
}
