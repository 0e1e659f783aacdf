"""Dropout draws from what a number is: independent draws, the same wherever and however often they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anychip.families.telechat2 import config_to_json
from anychip.model.decoder import Decoder
from anychip.model.dropout import drop, layer_keys, token_keys
from anychip.model.rope import rotary
from anychip.recipe.schema import ModelConfig
from anychip.train.recompute import apply_recompute

RATE = 0.1


def dropped(keys: Tensor, channels: int = 512, branch: int = 0, rate: float = RATE) -> Tensor:
    """Which numbers are dropped, bool [b, s, h]."""
    return drop(torch.ones(*keys.shape, channels), keys, branch, rate) == 0


def layer_of(step: int = 1, layer: int = 0, seed: int = 7, rows: int = 4, length: int = 512) -> Tensor:
    return layer_keys(token_keys(seed, step, range(rows), length), layer)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())).double())[0, 1])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_overall_and_for_every_token_and_channel(rate: float) -> None:
    mask = dropped(layer_of(), rate=rate).double()
    variance = rate * (1 - rate)
    assert abs(float(mask.mean()) - rate) < 4.5 * (variance / mask.numel()) ** 0.5
    for dims in ((0, 1), (2,)):  # of a channel; of a token
        shares = mask.mean(dim=dims)
        drawn = mask.numel() / shares.numel()
        chi_square = float(((shares - rate) ** 2).sum() * drawn / variance)
        assert abs(chi_square / shares.numel() - 1) < 4.5 * (2 / shares.numel()) ** 0.5


def test_draws_do_not_depend_on_their_neighbours() -> None:
    mask = dropped(layer_of())
    pairs = {
        "channel": (mask[..., 1:], mask[..., :-1]),
        "channel of another half": (mask[..., 256:], mask[..., :256]),
        "position": (mask[:, 1:], mask[:, :-1]),
        "row": (mask[1:], mask[:-1]),
        "branch": (mask, dropped(layer_of(), branch=1)),
        "layer": (mask, dropped(layer_of(layer=1))),
        "step": (mask, dropped(layer_of(step=2))),
        "seed": (mask, dropped(layer_of(seed=8))),
        "position and channel": (mask[:, 1:, :-1], mask[:, :-1, 1:]),
    }
    for what, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < 4.5 / one.numel() ** 0.5, what


def test_a_part_of_a_batch_draws_what_the_whole_batch_draws_there() -> None:
    whole = dropped(layer_of(rows=6, length=64))
    rows = dropped(layer_keys(token_keys(7, 1, range(2, 5), 64), 0))
    assert torch.equal(rows, whole[2:5])
    longer = dropped(layer_of(rows=6, length=80))  # padded further, under another layout
    assert torch.equal(longer[:, :64], whole)
    assert torch.equal(dropped(layer_of(rows=6, length=64)[:, 17:31]), whole[:, 17:31])


def test_the_hash_is_the_one_that_is_documented() -> None:
    """In whole numbers of any size: masks of a run that goes on must not change with a release or a chip."""
    word = 2**32 - 1

    def words(text: str) -> tuple[int, int]:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = (x ^ x >> 15) * 0x21F0AAAD & word
        return x ^ x >> 16

    channels, rows, length, step, layer, branch = 5, range(3, 5), 7, 11, 2, 1
    mask = dropped(layer_keys(token_keys(7, step, rows, length), layer), channels, branch, rate=0.5)
    of_step, of_layer = words(f"step 7 {step}"), words(f"layer {layer}")
    for (number, row), position, channel in product(enumerate(rows), range(length), range(channels)):
        low, high = (mix(mix(row ^ part) ^ position) for part in of_step)
        low, high = mix(low ^ of_layer[0]), mix(high >> 1 ^ of_layer[1]) >> 1
        x = low ^ branch * channels + channel
        x = ((x ^ x >> 16) * 0x7FEB352D & word) ^ high
        x = (x ^ x >> 15) * 0x21F0AAAD & word
        assert bool(mask[number, position, channel]) == (x < 2**31)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_up_and_backward_drops_the_same(dtype: torch.dtype) -> None:
    keys = layer_of(rows=2, length=48)
    x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    out = drop(x, keys, 0, RATE)
    kept = ~dropped(keys, 32)
    torch.testing.assert_close(out, torch.where(kept, x / (1 - RATE), 0).to(dtype))
    weights = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(weights)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(kept, weights / (1 - RATE), 0).to(dtype))


def _gradients(model: Decoder, tokens: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, keys=keys).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_layer_drops_of_both_branches_and_nothing_without_keys(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder]
) -> None:
    plain, model = random_decoder(make_config()), random_decoder(make_config(hidden_dropout=0.25))
    tokens = torch.arange(2 * 24).view(2, 24) % 67
    assert torch.equal(model(tokens), plain(tokens))
    keys = token_keys(7, 1, range(2), 24)
    cos, sin, scale = rotary(plain.config, 0, 24, 24)
    x = plain.embed(tokens)
    layer: Any
    for number, layer in enumerate(plain.layers):  # by hand, of the plain model's branches
        own = layer_keys(keys, number)
        mixed = layer.self_attn(layer.input_layernorm(x), cos, sin, scale, None, None)
        x = x + torch.where(dropped(own, 32, 0, 0.25), 0, mixed / 0.75)
        answer = layer.mlp(layer.post_attention_layernorm(x))
        x = x + torch.where(dropped(own, 32, 1, 0.25), 0, answer / 0.75)
    torch.testing.assert_close(model(tokens, keys=keys), plain.final(x))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_layer_computed_again_draws_the_same_mask(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder], mode: Any
) -> None:
    config, tokens = make_config(hidden_dropout=0.25), torch.arange(2 * 24).view(2, 24) % 67
    keys = token_keys(7, 1, range(2), 24)
    expected = _gradients(random_decoder(config), tokens, keys)
    model = random_decoder(config)
    apply_recompute(model, mode)
    found = _gradients(model, tokens, keys)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    without = _gradients(model, tokens, None)
    assert any(not torch.equal(without[name], gradient) for name, gradient in expected.items())


def test_modules_for_further_tokens_drop_by_draws_of_their_own(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder]
) -> None:
    fields = {"num_nextn_predict_layers": 1, "family": "llama", "biases": "none"}
    plain, model = (random_decoder(make_config(hidden_dropout=rate, **fields)) for rate in (0.0, 0.25))
    tokens = torch.arange(2 * 24).view(2, 24) % 67
    hidden, keys = plain(tokens), token_keys(7, 1, range(2), 24)
    without, found = model.further(hidden, tokens)[0], model.further(hidden, tokens, keys=keys)[0]
    assert torch.equal(without, plain.further(hidden, tokens)[0])
    assert not torch.equal(found, without)


def test_dropout_of_attention_is_refused_with_the_reason(make_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValueError, match=r"attention_dropout 0.1: .* set it to 0 and use hidden_dropout"):
        make_config(attention_dropout=0.1)
    for impossible in (-0.1, 1.0):
        with pytest.raises(ValueError, match="hidden_dropout"):
            make_config(hidden_dropout=impossible)


def test_the_published_configuration_says_what_the_model_was_trained_with(
    make_config: Callable[..., ModelConfig],
) -> None:
    published = config_to_json(make_config(hidden_dropout=0.1), "bfloat16", 1, 2, 3)
    assert (published["hidden_dropout"], published["attention_dropout"]) == (0.1, 0.0)
