"""Experts and latent attention in the serving engine give what the decoder gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_models import LATENT, NAMED, SHAPE, SIGMOID, SOFTMAX, random_decoder

from anychip.errors import InputError
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig
from anychip.serve.inference import InferenceModel, Piece

IDS = [(7 * i * i + 3 * i + 1) % 64 for i in range(30)]
MUP = {"input_mult": 3.0, "output_mult": 0.5, "mup_scale_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    **NAMED,
    "plain queries": {**LATENT, "q_lora_rank": 0},
    "dense, no biases, muP": {
        **SHAPE,
        "biases": "none",
        "input_mult": 3.0,
        "output_mult": 0.5,
        "mup_scale_factor": 4.0,
    },
    "yarn": {**SHAPE, "yarn": {"factor": 4.0, "original_max_position_embeddings": 8}},
    "tied": {**SHAPE, "tie_word_embeddings": True},
}


def whole(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor([ids])))[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("release", [False, True])
def test_pieces_of_a_sequence_give_the_logits_of_the_decoder(name: str, release: bool) -> None:
    decoder = random_decoder(ModelConfig(**MODELS[name]), torch.float32)
    expected, chunks = whole(decoder, IDS), [11, 1, 1, 7, 10]
    model = InferenceModel(decoder, torch.float32, release=release)
    cache, start = model.new_cache(len(IDS)), 0
    for size in chunks:
        found = model.forward(torch.tensor(IDS[start : start + size]), [Piece(cache, size, every=True)])
        torch.testing.assert_close(found, expected[start : start + size], atol=3e-4, rtol=1e-3)
        start += size


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_sequences_in_slots_attend_together(name: str) -> None:
    decoder = random_decoder(ModelConfig(**MODELS[name]), torch.float32)
    model = InferenceModel(decoder, torch.float32)
    slots = model.new_slots(3, 32)
    sequences = [IDS[:9], IDS[4:17], IDS[10:21]]
    taken = [slots.take(ids) for ids in sequences]
    assert all(slot is not None for slot in taken)
    for slot, ids in zip(taken, sequences, strict=True):
        model.forward(torch.tensor(ids[:-2]), [Piece(slot, len(ids) - 2)], slots)  # type: ignore[arg-type]
    for place in (-2, -1):
        ids = torch.tensor([sequence[place] for sequence in sequences])
        found = model.forward(ids, [Piece(slot, 1) for slot in taken], slots)  # type: ignore[arg-type]
        for row, sequence in zip(found, sequences, strict=True):
            expected = whole(decoder, sequence)[place]
            torch.testing.assert_close(row, expected, atol=3e-4, rtol=1e-3)


def test_the_batch_invariant_mode_is_refused() -> None:
    for model in (SIGMOID, SOFTMAX):
        with pytest.raises(InputError, match="batch-invariant"):
            InferenceModel(random_decoder(ModelConfig(**model), torch.float32), torch.float32, invariant=True)
