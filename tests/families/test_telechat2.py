from __future__ import annotations

import math
from typing import Any

import pytest

from anychip.errors import InputError
from anychip.families.presets import PRESETS
from anychip.families.telechat2 import (
    config_from_json,
    config_to_json,
    prompt_parts,
    published_tensors,
    same_scaling,
)
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe.schema import ModelConfig, RopeScaling

SPECIAL = {
    "<_unk>": 0, "<_start>": 1, "<_end>": 2, "<_pad>": 3, "<_user>": 4, "<_bot>": 5, "<_system>": 6,
}  # fmt: skip

# The first release's config.json of the 115B, without what no reader needs.
CONFIG_115B: dict[str, Any] = {
    "architectures": ["TelechatForCausalLM"],
    "model_type": "telechat",
    "vocab_size": 131072,
    "hidden_size": 8192,
    "ffn_hidden_size": 40960,
    "n_layer": 96,
    "n_head": 64,
    "num_key_value_heads": 8,
    "layer_norm_epsilon": 1e-5,
    "base_seqlen": 8192,
    "training_seqlen": 8192,
    "seq_length": 8192,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "flash_attn": True,
    "pretraining_tp": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def preset(name: str) -> ModelConfig:
    return ModelConfig(**PRESETS[name])


def read(**changes: Any) -> tuple[ModelConfig, list[str]]:
    raw = {**CONFIG_115B, **changes}
    return config_from_json({name: value for name, value in raw.items() if value is not ...}, "config.json")


def test_the_115b_has_the_published_tensors_and_bytes() -> None:
    shapes = {tensor.name: tensor.shape for tensor in published_tensors(preset("telechat2-115b"))}
    assert len(shapes) == 963
    assert sum(4 * math.prod(shape) for shape in shapes.values()) == 453_131_665_408
    assert shapes["transformer.h.95.self_attention.key_value.weight"] == (2048, 8192)
    assert shapes["transformer.h.0.mlp.down_proj.bias"] == (8192,)
    biases = {name.split(".", 3)[-1] for name in shapes if name.endswith("bias")}
    assert biases == {"self_attention.dense.bias", "mlp.down_proj.bias"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("telechat2-3b", 3_070_528_512),
        ("telechat2-7b", 7_617_351_680),
        ("telechat2-35b", 35_435_059_200),
        ("telechat2-115b", 113_282_916_352),
    ],
)
def test_presets_have_exactly_the_published_parameters(name: str, parameters: int) -> None:
    tensors = list(published_tensors(preset(name)))
    assert sum(math.prod(tensor.shape) for tensor in tensors) == parameters
    logical = [part for tensor in tensors for part in tensor.logical]
    assert sorted(logical) == sorted(name for name, _ in parameter_shapes(preset(name)))


def test_the_published_115b_config_is_the_preset() -> None:
    config, warnings = read()
    wanted = preset("telechat2-115b")
    assert config == wanted.model_copy(update={"initializer_range": 0.02})
    assert warnings == []


def test_the_first_release_with_eps_1e_8_is_read_as_written_and_warned_about() -> None:
    config, warnings = read(layer_norm_epsilon=1e-8)
    assert config.rms_norm_eps == 1e-8
    assert len(warnings) == 1 and "layer_norm_epsilon" in warnings[0] and "1e-05" in warnings[0]


@pytest.mark.parametrize("name", ["TeleChat2ForCausalLM", "TeleChatForCausalLM", "TelechatForCausalLM"])
def test_all_spellings_of_the_architecture_are_known(name: str) -> None:
    assert read(architectures=[name])[0].hidden_size == 8192


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["\x1b[31mevil"]}, r"\\x1b"),
        ({"num_experts": 16}, "experts"),
        ({"moe_config": {"expert_num": 16}}, "experts"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"rope_scaling": {"rope_type": "telechat3-yarn", "factor": 4}}, "telechat3-yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, "factor"),
        ({"rope_scaling": "dynamic"}, "rope_scaling"),
        ({"rope_scaling": [1] * 1000}, "rope_scaling"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "8192"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": -8192}, "hidden_size"),
        ({"hidden_size": 1 << 60}, "hidden_size"),
        ({"hidden_size": 8192.5}, "valid integer"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"n_head": 63}, "multiple"),
        ({"n_layer": 10**9}, "layers"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"base_seqlen": 0}, "base_seqlen"),
        ({"base_seqlen": ..., "training_seqlen": "long"}, "seqlen"),
        ({"training_seqlen": 8192.5}, "training_seqlen"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused_with_its_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        read(**changes)
    assert error.value.paragraph.startswith("config.json: ")
    assert len(error.value.paragraph) < 400 and error.value.paragraph.isprintable()


def test_dynamic_scaling_of_factor_one_is_the_published_rule() -> None:
    config, _ = read(rope_scaling={"rope_type": "dynamic", "factor": 1.0}, base_seqlen=32768, training_seqlen=32768)
    assert config.rope_scaling == RopeScaling(base_length=32768, training_length=32768)


@pytest.mark.parametrize("name", sorted(name for name in PRESETS if name.startswith("telechat2")))
def test_every_model_field_survives_config_json(name: str) -> None:
    config = preset(name).model_copy(update={"rms_norm_eps": 3e-6, "rope_theta": 1e6, "initializer_range": 0.01})
    again, _ = config_from_json(config_to_json(config, "bfloat16", 1, 2, 3), "config.json")
    assert again == config


def test_a_model_without_scaling_survives_as_one_without_scaling_in_its_context() -> None:
    config = preset("telechat2-3b").model_copy(update={"rope_scaling": None, "max_position_embeddings": 20_000})
    raw = config_to_json(config, "bfloat16", None, 2, None)
    # Absent lengths would mean 8192 elsewhere, and scaling from there on.
    assert raw["base_seqlen"] == raw["training_seqlen"] == 20_000
    again, _ = config_from_json(raw, "config.json")
    assert same_scaling(again, config, 20_000)
    assert not same_scaling(again, config, 20_001)


def test_scaling_that_differs_within_the_context_is_not_the_same() -> None:
    one = preset("telechat2-3b")
    other = one.model_copy(update={"rope_scaling": RopeScaling(base_length=4096, training_length=8192)})
    assert not same_scaling(one, other, 32_768) and not same_scaling(one, other, 100)
    published = one.model_copy(update={"rope_scaling": RopeScaling(cached_keys="published")})
    assert same_scaling(one, published, 32_768)


def test_template_b_as_published() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    expected = [6, "be brief\n", 4, "hi", 5, "hello", 2, "\n", 4, "bye", 5]
    assert prompt_parts(messages, SPECIAL) == expected


def test_template_a_as_published() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert prompt_parts(messages, SPECIAL, "A") == [1, 4, "hi", 5, "hello", 2, 4, "bye", 5]


def test_roles_that_a_template_does_not_know_are_refused() -> None:
    with pytest.raises(InputError, match="system"):
        prompt_parts([{"role": "system", "content": "x"}], SPECIAL, "A")
    with pytest.raises(InputError, match="<_bot>"):
        prompt_parts([], {"<_user>": 4, "<_end>": 2})
