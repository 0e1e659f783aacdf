"""The decoder computes with the operators it is given: training steps and cached decoding come out the same."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_npu import fake_npu
from torch import Tensor

from anychip.chips.operators import Operators, operators_for, reference
from anychip.model.cache import KeyValueCache
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig
from anychip.train.recompute import apply_recompute

CONFIG = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(0))


def make_decoder(operators: Operators) -> Decoder:
    decoder = Decoder(CONFIG, torch.float32, operators)
    init_parameters(decoder, CONFIG, seed=0)
    return decoder


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    decoder.logits(decoder(IDS)).square().mean().backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_training_with_a_vendors_operators(monkeypatch: pytest.MonkeyPatch, recompute: Any) -> None:
    expected = gradients(make_decoder(reference))
    monkeypatch.setitem(sys.modules, "torch_npu", fake_npu())
    decoder = make_decoder(operators_for("ascend"))
    apply_recompute(decoder, recompute)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(decoder)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_decoding_with_a_vendors_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", fake_npu())
    decoder = make_decoder(operators_for("ascend"))
    cache = KeyValueCache(CONFIG, 2, 12, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [decoder(IDS[:, part], cache) for part in (slice(0, 5), slice(5, 11), slice(11, 12))]
        torch.testing.assert_close(torch.cat(pieces, 1), make_decoder(reference)(IDS), rtol=1e-4, atol=1e-5)


def test_every_operator_of_the_model_is_called() -> None:
    seen: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            seen.append(name)
            return getattr(reference, name)(*args, **keywords)

        return call

    names = ("attention", "rms_norm", "rotate", "swiglu")
    make_decoder(replace(reference, **{name: counted(name) for name in names}))(IDS)
    assert {name: seen.count(name) for name in names} == {"attention": 2, "rms_norm": 5, "rotate": 4, "swiglu": 2}


def test_attention_can_be_replaced_from_outside() -> None:
    """What splits a sequence over processes does so."""
    decoder = make_decoder(reference)
    calls: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        calls.append((*q.shape, k.shape[1]))
        assert keywords.keys() == {"scale", "causal", "mask"} and keywords["causal"]
        return reference.attention(q, k, v, **keywords)

    expected = decoder(IDS)
    for layer in decoder.layers:
        layer.self_attn.attend = attend
    assert torch.equal(decoder(IDS), expected)
    assert calls == [(2, 4, 12, 8, 2)] * 2
