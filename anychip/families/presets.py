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
}
