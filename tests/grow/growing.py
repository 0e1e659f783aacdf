"""Models small enough to grow hundreds of times, with weights that are nothing special."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.model.arithmetic import parameter_shapes
from anychip.recipe.schema import GrowthConfig, ModelConfig


def small_model(**fields: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return ModelConfig.model_validate(sizes | fields)


def random_state(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Weights, gains and biases of size one or so, and AdamW's moments."""
    chance = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config):
        value = torch.randn(shape, generator=chance, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * value
        elif len(shape) == 2 and not name.startswith("embed"):
            value = value / shape[1] ** 0.5
        state[f"model.{name}"] = value.to(dtype)
        state[f"optimizer.exp_avg.{name}"] = torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)
        state[f"optimizer.exp_avg_sq.{name}"] = torch.rand(shape, generator=chance, dtype=torch.float64).to(dtype)
        state[f"optimizer.step.{name}"] = torch.tensor(50.0)
    return state


def growth(mode: str = "immediate", layers: str = "even", **to: object) -> GrowthConfig:
    return GrowthConfig.model_validate({"at_tokens": 1, "to": to, "mode": mode, "layers": layers})
