"""Prepared weights give what the decoder gives: whole, in pieces, beside other sequences, in every precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from telechat2_reference import exact_rule, forward, published_rule
from torch import Tensor

from anychip.chips.operators.prepared import packs_bf16
from anychip.model.decoder import Decoder
from anychip.recipe.schema import RopeScaling
from anychip.serve import inference as inference_module
from anychip.serve.inference import InferenceModel, Piece
from anychip.serve.products import Precision, choose_precision, make_product

IDS = [(7 * i * i + 3 * i + 1) % 320 for i in range(36)]
PRECISIONS = [
    Precision(torch.float32, torch.float32),
    Precision(torch.bfloat16, torch.bfloat16),
    Precision(torch.bfloat16, torch.float32, packed=True),
    *([Precision(torch.bfloat16, torch.bfloat16, panels=True)] if packs_bf16(torch.device("cpu")) else []),
]
NAMES = ["fp32", "bf16", "packed", "panels"][: len(PRECISIONS)]


def read(model: InferenceModel, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits [len(chunks), vocab_size] after each piece of `ids`."""
    cache, logits, start = model.new_cache(len(ids)), [], 0
    for size in chunks:
        logits.append(model.forward(torch.tensor(ids[start : start + size]), [Piece(cache, size)])[0])
        start += size
    return torch.stack(logits).double()


def full_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor([ids])))[0].double()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[1] * 36, [20] + [1] * 16, [7, 29], [36]])
def test_equals_the_decoder(make_decoder: Callable[..., Decoder], kv_heads: int, chunks: list[int]) -> None:
    decoder = make_decoder(num_key_value_heads=kv_heads)
    expected = full_logits(decoder, IDS)[torch.tensor(chunks).cumsum(0) - 1]
    found = read(InferenceModel(decoder, torch.float32), IDS, chunks)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


def test_sequences_of_any_length_share_a_step(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    model = InferenceModel(decoder, torch.float32)
    first, second, third = model.new_cache(40), model.new_cache(40), model.new_cache(40)
    model.forward(torch.tensor(IDS[:9]), [Piece(first, 9)])
    model.forward(torch.tensor([*IDS[:3], IDS[9]]), [Piece(second, 3), Piece(first, 1)])
    logits = model.forward(
        torch.tensor([IDS[3], *IDS[5:12], IDS[10]]), [Piece(second, 1), Piece(third, 7), Piece(first, 1)]
    )
    for row, ids in zip(logits.double(), [IDS[:4], IDS[5:12], IDS[:11]], strict=True):
        torch.testing.assert_close(row, full_logits(decoder, ids)[-1], atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=NAMES[1:])
def test_bf16_weights_stay_close_and_packing_is_closer(
    make_decoder: Callable[..., Decoder], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision.packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build has no packed fp16 products")
    decoder = make_decoder()
    with torch.no_grad():  # so that only activations are rounded, not weights
        for parameter in decoder.parameters():
            parameter.copy_(parameter.bfloat16().float())
    monkeypatch.setattr(inference_module, "choose_precision", lambda weights, device, **_: precision)
    found = read(InferenceModel(decoder, torch.bfloat16), IDS, [1] * 36)
    scale = full_logits(decoder, IDS).std()
    error = (found - full_logits(decoder, IDS)).abs().max() / scale
    assert error < (1e-4 if precision.packed else 0.3)


def test_bf16_weights_are_rounded_as_an_export_rounds_them(make_decoder: Callable[..., Decoder]) -> None:
    decoder, rounded = make_decoder(), make_decoder()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16().float())
    left = read(InferenceModel(decoder, torch.bfloat16), IDS, [36])
    right = read(InferenceModel(rounded, torch.bfloat16), IDS, [36])
    assert (left - right).abs().max() < 0.05 * right.std()


def test_published_mode_keeps_the_published_hazard(make_decoder: Callable[..., Decoder]) -> None:
    scaling = RopeScaling(base_length=8, training_length=8, cached_keys="published")
    decoder = make_decoder(rope_scaling=scaling)
    weights, read_at = dict(decoder.named_parameters()), [20] * 20 + list(range(21, 37))
    found = read(InferenceModel(decoder, torch.float32), IDS, [20] + [1] * 16)
    published = forward(decoder.config, weights, IDS, read_at, published_rule(decoder.config))[19:]
    torch.testing.assert_close(found, published, atol=3e-4, rtol=1e-4)
    mended = forward(decoder.config, weights, IDS, read_at, exact_rule(decoder.config))[19:]
    assert (found - mended)[0].abs().max() < 0.05, "the prompt alone differs only by its fp16 tables"
    assert (found - mended)[-1].abs().max() > 0.2, "stale keys change the answer"


@pytest.mark.parametrize("cached_keys", ["rerotate", "published"])
def test_a_long_prompt_in_pieces_is_the_prompt_at_once(make_decoder: Callable[..., Decoder], cached_keys: str) -> None:
    scaling = RopeScaling.model_validate({"base_length": 8, "training_length": 8, "cached_keys": cached_keys})
    model = InferenceModel(make_decoder(rope_scaling=scaling), torch.float32)
    cache = model.new_cache(36)
    for start in range(0, 36, 12):
        pieces = [Piece(cache, 12, sequence_length=36)]
        logits = model.forward(torch.tensor(IDS[start : start + 12]), pieces)[0].double()
    torch.testing.assert_close(logits, read(model, IDS, [36])[0], atol=3e-4, rtol=1e-4)


def test_releasing_empties_the_decoder_and_keeps_the_answer(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    expected = full_logits(decoder, IDS)[-1]
    model = InferenceModel(decoder, torch.float32, release=True)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    torch.testing.assert_close(read(model, IDS, [36])[0], expected, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS, ids=NAMES)
@pytest.mark.parametrize("values", ["usual", "tiny", "huge"])
def test_products_keep_the_weights_they_are_given(precision: Precision, values: str) -> None:
    """Weights outside fp16's range are not packed."""
    if precision.packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build has no packed fp16 products")
    size = {"usual": 0.02, "tiny": 1e-9, "huge": 1e6}[values]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 16, generator=generator) * size).bfloat16().float()
    bias = (torch.randn(24, generator=generator) * size).bfloat16().float()
    x = torch.randn(3, 16, generator=generator).bfloat16()
    found = make_product(weight, bias, precision)(x.to(precision.activations))
    assert found.dtype == precision.activations
    expected = x.double() @ weight.double().T + bias.double()
    tolerance = 2e-2 if precision.activations == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double() / size, expected / size, atol=tolerance, rtol=tolerance)


def test_precision_depends_on_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_precision(torch.float32, cpu) == Precision(torch.float32, torch.float32)
    monkeypatch.setattr("anychip.chips.cpu.CpuBackend.multiplies_bf16", lambda self: True)
    panels = packs_bf16(cpu)
    assert choose_precision(torch.bfloat16, cpu) == Precision(torch.bfloat16, torch.bfloat16, panels=panels)
    monkeypatch.setattr("anychip.chips.cpu.CpuBackend.multiplies_bf16", lambda self: False)
    chosen = choose_precision(torch.bfloat16, cpu)
    assert chosen.packed == ("fbgemm" in torch.backends.quantized.supported_engines)
