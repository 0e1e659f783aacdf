"""The decoder against its plain fp64 description, its shapes, its causality and its initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from telechat2_reference import exact_rule, forward, published_rule

from anychip.families.presets import PRESETS
from anychip.model.arithmetic import flops_per_token, kv_cache_bytes_per_token, num_parameters, parameter_shapes
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters, init_tensor
from anychip.recipe.schema import ModelConfig, RopeScaling

IDS = [5, 9, 1, 33, 66, 0, 12, 12, 40, 3, 21]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("telechat2-3b", 3_070_528_512),
        ("telechat2-7b", 7_617_351_680),
        ("telechat2-35b", 35_435_059_200),
        ("telechat2-115b", 113_282_916_352),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    config = ModelConfig.model_validate(PRESETS[preset])
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters
    assert num_parameters(config) == parameters


def test_names_and_shapes_are_those_of_the_arithmetic(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config()
    found = {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}
    assert found == dict(parameter_shapes(config))
    biased = {name.split(".", 2)[-1] for name in found if name.endswith("bias")}
    assert biased == {"self_attn.o_proj.bias", "mlp.down_proj.bias"}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_the_plain_reference(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder], kv_heads: int
) -> None:
    config = make_config(num_key_value_heads=kv_heads)
    decoder = random_decoder(config)
    expected = forward(config, dict(decoder.named_parameters()), IDS, [len(IDS)] * len(IDS), exact_rule(config))
    with torch.no_grad():
        found = decoder.logits(decoder(torch.tensor([IDS, IDS[::-1]])))
    torch.testing.assert_close(found[0].double(), expected, atol=2e-4, rtol=1e-4)


def test_a_whole_pass_beyond_the_training_length_follows_the_published_rule(
    make_config: Callable[..., ModelConfig],
    random_decoder: Callable[[ModelConfig], Decoder],
    short_scaling: Callable[[str], RopeScaling],
) -> None:
    config = make_config(rope_scaling=short_scaling("rerotate"))
    decoder = random_decoder(config)
    weights, read_at = dict(decoder.named_parameters()), [len(IDS)] * len(IDS)
    with torch.no_grad():
        found = decoder.logits(decoder(torch.tensor([IDS])))[0].double()
    torch.testing.assert_close(found, forward(config, weights, IDS, read_at, exact_rule(config)), atol=2e-4, rtol=1e-4)
    # fp16 tables move the same pass by little, ignoring the scaling moves it by much
    in_fp16 = forward(config, weights, IDS, read_at, published_rule(config))
    assert (found - in_fp16).abs().max() < 0.05
    unscaled = forward(make_config(), weights, IDS, read_at, exact_rule(make_config()))
    assert (found - unscaled).abs().max() > 0.5


def test_a_token_does_not_see_later_ones(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder]
) -> None:
    decoder = random_decoder(make_config())
    changed = [*IDS[:6], 2, *IDS[7:]]
    with torch.no_grad():
        before, after = decoder(torch.tensor([IDS]))[0], decoder(torch.tensor([changed]))[0]
    torch.testing.assert_close(before[:6], after[:6], atol=1e-5, rtol=1e-5)
    assert ((before[6:] - after[6:]).abs().amax(-1) > 1e-3).all()


def test_bf16_compute_keeps_fp32_masters(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config()
    decoder = Decoder(config, compute_dtype=torch.bfloat16)
    init_parameters(decoder, config, seed=0)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    wide = Decoder(config)
    wide.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        narrow, exact = decoder(torch.tensor([IDS])), wide(torch.tensor([IDS]))
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - exact).abs().max() < 0.1


def test_initial_values_are_a_function_of_seed_and_name(make_config: Callable[..., ModelConfig]) -> None:
    config, deeper = make_config(), make_config(num_hidden_layers=3)
    shapes: dict[str, Any] = dict(parameter_shapes(config))
    one, two = Decoder(config), Decoder(config)
    init_parameters(one, config, seed=7)
    torch.manual_seed(123)
    init_parameters(two, config, seed=7)
    for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right), name
        assert torch.equal(left, init_tensor(name, shapes[name], config, seed=7)), name
    values = {name: tensor for name, tensor in one.named_parameters() if tensor.dim() == 2}
    assert len({tensor.sum().item() for tensor in values.values()}) == len(values), "two tensors start alike"
    name = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(values[name], init_tensor(name, shapes[name], config, seed=8))
    assert torch.equal(values[name], init_tensor(name, shapes[name], deeper, seed=7)), "depth does not matter"
    ratio = values["layers.0.mlp.down_proj.weight"].std() / values["layers.0.mlp.up_proj.weight"].std()
    assert ratio.item() == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(2 * 2 layers)


def test_flops_and_cache_bytes_of_published_models() -> None:
    big = ModelConfig.model_validate(PRESETS["telechat2-115b"])
    flops = flops_per_token(big, 8192)
    assert flops.model / 1e9 == pytest.approx(712, abs=1)
    assert flops.full / 1e9 == pytest.approx(751, abs=1)
    assert kv_cache_bytes_per_token(big) == 393_216
    assert kv_cache_bytes_per_token(ModelConfig.model_validate(PRESETS["telechat2-35b"])) == 1_572_864
