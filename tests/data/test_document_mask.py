"""Documents of a sample are numbered by the token that ends each of them."""

from __future__ import annotations

from pathlib import Path

import megatron_format
import pytest
import torch
from tiny_corpus import make_recipe, sentence

from anychip.data.batch import number_documents
from anychip.data.loader import TrainingData
from anychip.data.prepare import prepare_data
from anychip.data.tokenizer import train_bpe
from anychip.data.validation import validation_batches
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory


def masked(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"document_mask": True})})


def test_an_end_opens_the_next_document() -> None:
    assert number_documents(torch.tensor([[5, 6, 2, 7, 2, 2, 8], [2, 3, 3, 3, 3, 3, 3]]), 2).tolist() == [
        [0, 0, 1, 1, 2, 3, 3],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_each_document_of_a_sample_has_a_number(prepared: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = prepared
    plain, data = TrainingData(run, recipe), TrainingData(run, masked(recipe))
    several = 0
    for step in range(20):
        batch = data.batch(step)
        assert batch.documents is not None and batch.documents.dtype == torch.int64
        assert torch.equal(batch.input_ids, plain.batch(step).input_ids) and plain.batch(step).documents is None
        for sample in data.samples(step):
            spans = batch.documents[sample.row][: sum(span.tokens for span in sample.documents)].split(
                [span.tokens for span in sample.documents]
            )
            assert all((span == span[0]).all() for span in spans)
            assert len({int(span[0]) for span in spans}) == len(spans)
            several += len(spans) > 1
    assert several
    batch, _ = next(iter(validation_batches(run, masked(recipe), 2, 500)))
    assert batch.documents is not None and torch.equal(batch.documents, number_documents(batch.input_ids, 2))


def test_documents_without_an_end_are_refused(tmp_path: Path) -> None:
    train_bpe((sentence(n) for n in range(30)), 300).save(tmp_path / "tokenizer")
    megatron_format.write(tmp_path / "theirs", [[[5, 6, 7, 8]], [[9, 10]]], 4)
    recipe = make_recipe(
        [{"name": "theirs", "path": str(tmp_path / "theirs"), "format": "megatron"}],
        data={"tokenizer": {"kind": "json", "path": str(tmp_path / "tokenizer" / "tokenizer.json")}},
    )
    run = RunDirectory(tmp_path / "run")
    prepare_data(recipe, run)
    TrainingData(run, recipe)
    with pytest.raises(InputError, match="does not end its documents with token 2"):
        TrainingData(run, masked(recipe))
