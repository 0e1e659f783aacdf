"""A tiny random model and a tiny trained tokenizer, as loading a run would give them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig, SamplingConfig
from anychip.serve.inference import InferenceModel
from anychip.serve.talker import Talker, make_talker

sys.path.append(str(Path(__file__).parents[1] / "model"))  # telechat2_reference


@dataclass(frozen=True)
class Loaded:
    decoder: Decoder
    tokenizer: Tokenizer
    sampling: SamplingConfig


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, 猫坐在垫子上 " * 8, "def f(x):\n    return x + 1\n" * 8], vocab_size=320)


def random_decoder(config: ModelConfig) -> Decoder:
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return decoder.eval()


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    def make(**changes: object) -> Decoder:
        fields: dict[str, object] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        return random_decoder(ModelConfig.model_validate({**fields, **changes}))

    return make


@pytest.fixture
def inference(make_decoder: Callable[..., Decoder]) -> InferenceModel:
    return InferenceModel(make_decoder(), torch.float32)


@pytest.fixture
def make_tiny_talker(make_decoder: Callable[..., Decoder], tokenizer: Tokenizer) -> Callable[..., Talker]:
    def make(**sampling: object) -> Talker:
        return make_talker(Loaded(make_decoder(), tokenizer, SamplingConfig(max_new_tokens=12)), sampling)

    return make
