"""Packed rows train exactly what the same dialogs train in rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_sft import recipe, run_with, write_dialogs

from anychip.data.batch import Batch
from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.errors import InputError
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig, RopeScaling
from anychip.train.loss import head_cross_entropy
from anychip.tune.collate import packed, padded
from anychip.tune.sft import SftData


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["what is a list? it is a list of things. be brief, please. " * 20], vocab_size=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> SftData:
    folder = tmp_path_factory.mktemp("packing")
    path = write_dialogs(folder / "d.jsonl", 60)
    return SftData(recipe(path, seq_length=64, packing=True), run_with(tokenizer, folder))


def loss_and_gradients(batch: Batch, scaling: RopeScaling | None) -> tuple[float, dict[str, torch.Tensor]]:
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, rope_scaling=scaling,
    )  # fmt: skip
    model = Decoder(config, torch.float64)
    init_parameters(model, config, 5)
    model.double()
    hidden = model(batch.input_ids, documents=batch.documents)
    loss = head_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, batch.labels.flatten(), 512)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scaling", [None, RopeScaling(base_length=16, training_length=64)])
def test_loss_and_gradients_are_those_of_dialogs_that_stand_alone(data: SftData, scaling: RopeScaling | None) -> None:
    """In fp64; what is between them is the rounding of the rotary tables, which are fp32: rotary scores depend on
    distances alone, and attention stays inside."""
    rows = data.samples(0)
    assert min(len(row) for row in rows) > 1
    together, gradients = loss_and_gradients(packed(rows, 64, data.tokenizer), scaling)
    alone, expected = loss_and_gradients(padded([s for row in rows for s in row], 64, data.tokenizer), scaling)
    assert together == pytest.approx(alone, rel=1e-8)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_without_the_documents_they_would_differ(data: SftData) -> None:
    batch = packed(data.samples(0), 64, data.tokenizer)
    alone, _ = loss_and_gradients(batch, None)
    mixed, _ = loss_and_gradients(Batch(batch.input_ids, batch.labels), None)
    assert abs(mixed - alone) > 1e-3 * alone


def test_batches_have_one_shape_and_an_epoch_has_every_dialog_once(data: SftData) -> None:
    subjects: list[str] = []
    for step in range(30):
        batch = data.batch(step)
        assert batch.input_ids.shape == (4, 64) and batch.documents is not None
        rows = data.samples(step)
        for row, samples in enumerate(rows):
            ids = batch.input_ids[row][batch.documents[row] >= 0].tolist()
            assert ids == [token for sample in samples for token in sample.input_ids.tolist()]
            subjects += [data.dialog(sample).subject for sample in samples]
            assert int(batch.documents[row].max()) == len(samples) - 1
        assert (batch.labels[batch.documents < 0] == -100).all()
        assert len(data.documents(step)) == len({data.dialog(s).subject for row in rows for s in row})
    assert len(set(subjects[:60])) == 60 and len(set(subjects[60:120])) == 60


def test_a_scale_that_follows_the_row_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Beyond training_length the published rule scales by the length of a row, which no dialog in it has."""
    made = recipe(write_dialogs(tmp_path / "d.jsonl", 8), seq_length=64, packing=True)
    for training_length, refused in ((64, False), (32, True)):
        scaling = RopeScaling(base_length=16, training_length=training_length)
        scaled = made.model_copy(update={"model": made.model.model_copy(update={"rope_scaling": scaling})})
        if refused:
            with pytest.raises(InputError, match="length of a row"):
                SftData(scaled, run_with(tokenizer, tmp_path))
        else:
            SftData(scaled, run_with(tokenizer, tmp_path))
