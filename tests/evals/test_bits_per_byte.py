"""Bits per byte against a brute-force computation, and the same for any tokenizer."""

from __future__ import annotations

import math

import pytest
import torch

from anychip.data.batch import Batch
from anychip.evals.bits_per_byte import evaluate_bits_per_byte
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig


def tiny(vocab_size: int) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model = Decoder(config)
    init_parameters(model, config, seed=1)
    return model


def random_batches(vocab_size: int, count: int) -> list[tuple[Batch, int]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocab_size, (3, 12), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[1, :4] = -100
        batches.append((Batch(tokens[:, :-1], labels), 40))
    return batches


def test_equals_a_brute_force_sum_over_the_scored_tokens() -> None:
    model, batches = tiny(50), random_batches(50, 3)
    bits, tokens = 0.0, 0
    with torch.no_grad():
        for batch, _ in batches:
            log_probabilities = torch.log_softmax(model.logits(model(batch.input_ids)).double(), dim=-1)
            for row, labels in zip(log_probabilities, batch.labels.tolist(), strict=True):
                for position, label in enumerate(labels):
                    if label != -100:
                        bits -= row[position, label].item() / math.log(2)
                        tokens += 1
    for chunk_tokens in (4, 7, 1024):
        found = evaluate_bits_per_byte(model, batches, chunk_tokens)
        assert found.bits == pytest.approx(bits, rel=1e-5)
        assert found.tokens == tokens and found.utf8_bytes == 120
        assert found.bits_per_byte == pytest.approx(bits / 120, rel=1e-5)
        assert found.nats_per_token == pytest.approx(bits * math.log(2) / tokens, rel=1e-5)


def test_a_uniform_model_needs_eight_bits_a_byte_whatever_its_tokens_are() -> None:
    text = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(1))
    by_byte = tiny(256)
    torch.nn.init.zeros_(by_byte.lm_head.weight)
    found = evaluate_bits_per_byte(by_byte, [(Batch(text[:, :-1], text[:, 1:]), 128)])
    assert found.bits_per_byte == pytest.approx(8.0, abs=1e-6)

    pairs = text[:, 1:].reshape(2, 32, 2) @ torch.tensor([256, 1])  # the same bytes, two to a token
    by_pair = tiny(65536)
    torch.nn.init.zeros_(by_pair.lm_head.weight)
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.int64), pairs[:, :-1]], dim=1)
    found = evaluate_bits_per_byte(by_pair, [(Batch(inputs, pairs), 128)])
    assert found.tokens == 64
    assert found.bits_per_byte == pytest.approx(8.0, abs=1e-6)


def test_leaves_the_model_as_it_was_and_refuses_no_text() -> None:
    model = tiny(50).train()
    evaluate_bits_per_byte(model, random_batches(50, 1))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no held-out text"):
        evaluate_bits_per_byte(model, [])


def test_documents_of_one_row_are_scored_as_if_each_stood_alone() -> None:
    """Rotary positions are relative, so a document's score does not depend on where in a row it lies."""
    model = tiny(50)
    tokens = torch.randint(0, 50, (1, 13), generator=torch.Generator().manual_seed(2))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = evaluate_bits_per_byte(model, [(Batch(inputs, labels, documents), 40)])
    alone = [
        evaluate_bits_per_byte(model, [(Batch(inputs[:, part], labels[:, part]), 20)])
        for part in (slice(0, 5), slice(5, 12))
    ]
    assert together.bits == pytest.approx(sum(one.bits for one in alone), rel=1e-5)
    assert together.bits != pytest.approx(evaluate_bits_per_byte(model, [(Batch(inputs, labels), 40)]).bits, rel=1e-5)
