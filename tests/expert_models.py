"""Small models with experts and latent attention, for tests of several rooms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anychip.model.arithmetic import parameter_shapes
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
SOFTMAX: dict[str, Any] = {**SHAPE, **EXPERTS, "family": "telechat2-moe"}
LATENT: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 4,
    "family": "telechat3-moe",
    "biases": "none",
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
}
SIGMOID: dict[str, Any] = {
    **LATENT,
    **EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
}


NAMED = {"softmax": SOFTMAX, "latent": LATENT, "sigmoid": SIGMOID}


def random_decoder(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Decoder:
    """No bias is zero and no norm is one, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config, dtype)
    model = model.to_empty(device="cpu").to(dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, shape in parameter_shapes(config):
            scale, offset = (0.1, 1.0) if "norm" in name else (0.2, 0.0)
            parameters[name].copy_(torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset)
    return model


def some_tokens(config: ModelConfig, rows: int = 2, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
