"""Presets of TeleChat2's relatives: exact counts, built without memory."""

from __future__ import annotations

import pytest
import torch

from anychip.families.presets import PRESETS
from anychip.model.arithmetic import kv_cache_bytes_per_token, num_active_parameters, num_parameters, parameter_shapes
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig

# all, and active a token; the first four are published, or follow from published shapes
COUNTS = {
    "telechat2-39b-a12b": (39_330_099_200, 12_149_534_720),
    "telechat3-36b": (36_239_579_136, 36_239_579_136),
    "telechat3-105b-a4.7b": (104_576_176_576, 4_675_835_648),
    "tele-flm-52b": (52_824_121_344, 52_824_121_344),
    "tele-flm-1t": (1_083_813_908_480, 1_083_813_908_480),
    "moe-1t-a30b": (1_023_630_922_752, 29_525_075_584),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_its_exact_number_of_parameters(name: str) -> None:
    config = ModelConfig(**PRESETS[name])
    with torch.device("meta"):
        model = Decoder(config)
    shapes = [(parameter, tuple(value.shape)) for parameter, value in model.named_parameters()]
    assert sorted(shapes) == sorted(parameter_shapes(config))
    assert sum(value.numel() for value in model.parameters()) == num_parameters(config) == COUNTS[name][0]
    assert num_active_parameters(config) == COUNTS[name][1]


def test_without_further_tokens_the_105b_has_its_other_published_number() -> None:
    config = ModelConfig(**{**PRESETS["telechat3-105b-a4.7b"], "num_nextn_predict_layers": 0})
    assert num_parameters(config) == 102_256_318_208
    assert kv_cache_bytes_per_token(config) == 51_840


def test_the_trillion_of_experts_is_the_105b_doubled() -> None:
    small, large = (ModelConfig(**PRESETS[name]) for name in ("telechat3-105b-a4.7b", "moe-1t-a30b"))
    for field in (
        *("hidden_size", "intermediate_size", "num_attention_heads"),
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ):
        assert getattr(large, field) == 2 * getattr(small, field), field
    for field in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(large, field) == getattr(small, field), field
