"""Small models whose weights are all far from their initial zeros and ones, so that no term can hide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig, RopeScaling

MakeConfig = Callable[..., ModelConfig]


@pytest.fixture
def make_config() -> MakeConfig:
    def make(**changes: object) -> ModelConfig:
        fields: dict[str, object] = {
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return ModelConfig.model_validate({**fields, **changes})

    return make


@pytest.fixture
def short_scaling() -> Callable[[str], RopeScaling]:
    """NTK scaling whose first steps come at 8, 16 and 32 tokens."""

    def make(cached_keys: str) -> RopeScaling:
        return RopeScaling.model_validate({"base_length": 8, "training_length": 8, "cached_keys": cached_keys})

    return make


@pytest.fixture
def random_decoder() -> Callable[[ModelConfig], Decoder]:
    def make(config: ModelConfig) -> Decoder:
        decoder = Decoder(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
                if "norm" in name:
                    parameter.add_(1.0)
        return decoder.eval()

    return make
