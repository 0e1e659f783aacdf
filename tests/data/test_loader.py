from __future__ import annotations

from pathlib import Path

import megatron_format
import pytest
import torch
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data.batch import IGNORE_LABEL
from anychip.data.corpora import open_corpora
from anychip.data.ledger import describe_document, describe_step, documents_of_step, steps_of_document
from anychip.data.loader import TrainingData
from anychip.data.prepare import inspect_data, prepare_data
from anychip.data.tokenizer import load_tokenizer, train_bpe
from anychip.data.validation import validation_batches, validation_texts
from anychip.errors import InputError, UnfitError
from anychip.files import write_json
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

Prepared = tuple[RunDirectory, Recipe]


def test_an_epoch_predicts_every_token_once_from_the_one_before_it(prepared: Prepared) -> None:
    run, recipe = prepared
    data = TrainingData(run, recipe)
    end = 2
    seen: dict[str, dict[int, tuple[list[int], list[int]]]] = {corpus.name: {} for corpus in data.corpora}
    for step in range(400):
        batch = data.batch(step)
        assert batch.input_ids.shape == batch.labels.shape == (4, 16)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        for sample in data.samples(step):
            row = batch.input_ids[sample.row].tolist(), batch.labels[sample.row].tolist()
            if sample.epoch == 0:
                assert sample.sample not in seen[sample.source]
                seen[sample.source][sample.sample] = row
            elif sample.epoch == 1:
                assert seen[sample.source][sample.sample] == row
    for corpus in data.corpora:
        rows = [seen[corpus.name][number] for number in range(len(seen[corpus.name]))]
        stream = corpus.tokens(0, corpus.token_count).tolist()
        labels = [label for _, row in rows for label in row if label != IGNORE_LABEL]
        inputs = [token for row, labels in rows for token, label in zip(row, labels, strict=True) if label >= 0]
        assert labels == stream
        assert inputs == [end, *stream[:-1]]


def test_ranks_read_their_own_rows_of_the_same_batch(prepared: Prepared) -> None:
    data = TrainingData(*prepared)
    for step in (0, 3, 9, 12345):
        whole = data.batch(step)
        for world_size in (1, 2, 4):
            each = 4 // world_size
            parts = [data.rows(step, rank * each, (rank + 1) * each) for rank in range(world_size)]
            assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_a_new_reader_continues_as_if_it_had_read_everything(prepared: Prepared) -> None:
    first = TrainingData(*prepared)
    batches = [first.batch(step) for step in range(12)]
    again = TrainingData(*prepared)
    assert all(torch.equal(again.batch(step).labels, batches[step].labels) for step in (11, 6, 7, 0))


def test_weights_and_their_change_are_exact(prepared: Prepared) -> None:
    data = TrainingData(*prepared)
    sources = [sample.source for step in range(27) for sample in data.samples(step)]
    assert sources[: 7 * 4].count("one") == 21
    changed = [sources[start : start + 3].count("two") for start in range(28, 108 - 3, 3)]
    assert set(changed) == {2}


def test_ledger_agrees_with_the_batches_both_ways(prepared: Prepared) -> None:
    run, recipe = prepared
    data = TrainingData(run, recipe)
    steps = recipe.training.steps
    forward = [sighting for step in range(steps) for sighting in documents_of_step(data, step)]
    for document in {sighting.document.id for sighting in forward}:
        assert [s for s in forward if s.document.id == document] == steps_of_document(data, document, steps)
    tokenizer = load_tokenizer(run.tokenizer)
    for step in (0, 8, 30):
        batch = data.batch(step)
        for sample in data.samples(step):
            labels = batch.labels[sample.row].tolist()
            for span in sample.documents:
                corpus = next(corpus for corpus in data.corpora if corpus.name == sample.source)
                inside = corpus.document_tokens(span.index)[span.start : span.start + span.tokens].tolist()
                assert labels[: span.tokens] == inside
                labels = labels[span.tokens :]
            assert set(labels) <= {IGNORE_LABEL}
    assert tokenizer.decode(batch.labels[0][batch.labels[0] >= 0].tolist()) in inspect_data(run, 30).replace(
        "<_end>", ""
    )


def test_ledger_speaks(prepared: Prepared) -> None:
    run, recipe = prepared
    document = documents_of_step(TrainingData(run, recipe), 3)[0].document.id
    assert document in describe_step(run, 3)
    assert "step 3 " in describe_document(run, document)
    with pytest.raises(InputError, match="no training document has the id one:nothing"):
        describe_document(run, "one:nothing")
    held_out = next(validation_texts(run, recipe, 10_000))[0]
    with pytest.raises(InputError, match="held-out"):
        describe_document(run, held_out)


def test_validation_counts_the_bytes_of_exactly_its_texts(prepared: Prepared) -> None:
    run, recipe = prepared
    tokenizer = load_tokenizer(run.tokenizer)
    for max_tokens in (10**6, 400, 1):
        texts = [text for _, text in validation_texts(run, recipe, max_tokens)]
        assert texts
        batches = list(validation_batches(run, recipe, 3, max_tokens))
        assert all(batch.labels.shape == (3, 16) for batch, _ in batches)
        assert sum(size for _, size in batches) == sum(len(text.encode()) for text in texts)
        labels = torch.cat([batch.labels.flatten() for batch, _ in batches])
        inputs = torch.cat([batch.input_ids.flatten() for batch, _ in batches])
        scored = labels[labels >= 0].tolist()
        assert scored == [token for text in texts for token in [*tokenizer.encode(text), 2]]
        assert inputs[labels >= 0].tolist() == [2, *scored[:-1]]
    everything = sum(corpus.token_count for corpus in open_corpora(run, recipe, "validation"))
    assert sum(int((batch.labels >= 0).sum()) for batch, _ in validation_batches(run, recipe, 3, 10**6)) == everything


def test_a_text_that_ends_with_a_batch_counts_once(prepared: Prepared) -> None:
    run, recipe = prepared
    single = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seq_length": 1})})
    sizes = [size for _, size in validation_batches(run, single, 1, 10**6) if size]
    assert sizes == [len(text.encode()) for _, text in validation_texts(run, single, 10**6)]


def test_held_out_documents_are_not_trained_on(prepared: Prepared) -> None:
    run, recipe = prepared
    held_out = {name for name, _ in validation_texts(run, recipe, 10**6)}
    data = TrainingData(run, recipe)
    trained = {sighting.document.id for step in range(300) for sighting in documents_of_step(data, step)}
    assert not held_out & trained
    assert len(held_out | trained) == 60


def test_missing_data_and_changed_sources_have_a_message(prepared: Prepared, tmp_path: Path) -> None:
    run, recipe = prepared
    with pytest.raises(InputError, match="has no prepared data"):
        TrainingData(RunDirectory(tmp_path), recipe)
    other = make_recipe([{"name": "three", "path": "x"}])
    with pytest.raises(InputError, match="no packed data of source three"):
        TrainingData(run, other)


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    train_bpe((sentence(n) for n in range(30)), 300).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer" / "tokenizer.json"


@pytest.mark.parametrize("named", ["megatron", "auto"])
def test_a_megatron_corpus_is_used_in_place(tmp_path: Path, tokenizer_path: Path, named: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    documents = [[[*tokenizer.encode(sentence(n)), 2]] for n in range(20)]
    megatron_format.write(tmp_path / "theirs", documents, 4)
    recipe = make_recipe(
        [{"name": "theirs", "path": str(tmp_path / "theirs"), "format": named}],
        data={"tokenizer": {"kind": "json", "path": str(tokenizer_path)}},
    )
    run = RunDirectory(tmp_path / "run")
    summary = prepare_data(recipe, run)
    assert summary["sources"]["theirs"]["documents"] == 20
    data = TrainingData(run, recipe)
    assert data.corpora[0].token_count == sum(len(document[0]) for document in documents[:18])
    assert documents_of_step(data, 0)[0].document.id.startswith("theirs#")
    assert steps_of_document(data, "theirs#5", 50)
    texts = [text for _, text in validation_texts(run, recipe, 10**6)]
    assert texts == [sentence(18), sentence(19)]
    batches = list(validation_batches(run, recipe, 2, 10**6))
    assert sum(size for _, size in batches) == sum(len(text.encode()) for text in texts)
    assert not (run.data / "train").exists()


def test_vocabulary_mismatch_has_a_message(tmp_path: Path, tokenizer_path: Path) -> None:
    megatron_format.write(tmp_path / "theirs", [[[1, 2, 9999]]], 4)
    source = {"name": "theirs", "path": str(tmp_path / "theirs"), "format": "megatron"}
    data = {"tokenizer": {"kind": "json", "path": str(tokenizer_path)}, "validation_fraction": 0.0}
    with pytest.raises(InputError, match=r"holds token 9999, but model.vocab_size is 512"):
        prepare_data(make_recipe([source], data=data), RunDirectory(tmp_path / "run"))
    text = {"name": "text", "path": str(write_jsonl(tmp_path / "a.jsonl", [sentence(n) for n in range(9)]))}
    small = make_recipe([text], data={"tokenizer": data["tokenizer"]}, model={"vocab_size": 280})
    with pytest.raises(InputError, match=r"has 300 pieces, but model.vocab_size is 280"):
        prepare_data(small, RunDirectory(tmp_path / "run2"))


def test_a_corpus_replaced_after_preparation_is_caught_at_the_batch(tmp_path: Path, tokenizer_path: Path) -> None:
    source = {"name": "theirs", "path": str(tmp_path / "theirs"), "format": "megatron"}
    data = {"tokenizer": {"kind": "json", "path": str(tokenizer_path)}, "validation_fraction": 0.0}
    recipe, run = make_recipe([source], data=data), RunDirectory(tmp_path / "run")
    megatron_format.write(tmp_path / "theirs", [[[1, 2, 3]]], 4)
    summary = prepare_data(recipe, run)
    for token in (600, -5):
        megatron_format.write(tmp_path / "theirs", [[[1, 2, token]]], 4)
        with pytest.raises(UnfitError, match="if it was replaced on purpose"):
            TrainingData(run, recipe).batch(0)
    del summary["seconds"], summary["sources"]["theirs"]["blocks_sha256"]
    write_json(run.data / "summary.json", summary)  # as an older release did
    with pytest.raises(InputError, match="holds token -5"):
        TrainingData(run, recipe).batch(0)
