"""Batches out of packed corpora: exact epochs, any cut of the rows, the ledger, held-out bytes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from anychip.data.batch import IGNORE_LABEL
from anychip.data.ledger import documents_of_step, steps_of_document
from anychip.data.loader import TrainingData, validation_batches
from anychip.data.prepare import inspect_data
from anychip.data.validation import validation_texts
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

Prepared = tuple[RunDirectory, Recipe]


def test_a_batch_is_the_same_however_often_and_in_whatever_order_it_is_read(prepared: Prepared) -> None:
    first, second = TrainingData(*prepared), TrainingData(*prepared)
    forwards = [first.batch(step) for step in range(12)]
    for step in reversed(range(12)):
        again = second.batch(step)
        assert torch.equal(forwards[step].input_ids, again.input_ids)
        assert torch.equal(forwards[step].labels, again.labels)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_of_any_number_of_processes_make_the_whole_batch(prepared: Prepared, world_size: int) -> None:
    data = TrainingData(*prepared)
    share = data.global_batch_size // world_size
    for step in (0, 6, 7, 40):
        whole = data.batch(step)
        parts = [data.rows(step, rank * share, (rank + 1) * share) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_labels_are_the_next_inputs(prepared: Prepared) -> None:
    batch = TrainingData(*prepared).batch(3)
    learned = batch.labels[:, :-1] != IGNORE_LABEL
    following = batch.labels[:, 1:] != IGNORE_LABEL
    both = learned & following
    assert torch.equal(batch.labels[:, :-1][both], batch.input_ids[:, 1:][both])


def test_every_token_is_a_label_exactly_once_an_epoch(prepared: Prepared) -> None:
    data = TrainingData(*prepared)
    seen: dict[tuple[str, int], Counter[int]] = {}
    learned: dict[tuple[str, int], Counter[int]] = {}
    for step in range(200):
        labels = data.batch(step).labels
        for sample in data.samples(step):
            key = (sample.source, sample.epoch)
            seen.setdefault(key, Counter())[sample.sample] += 1
            row = labels[sample.row]
            learned.setdefault(key, Counter()).update(row[row != IGNORE_LABEL].tolist())
    for corpus in data.corpora:
        samples = -(-corpus.token_count // data.seq_length)
        whole = Counter(np.asarray(corpus.tokens(0, corpus.token_count)).tolist())
        epochs = [key for key in seen if key[0] == corpus.name and seen[key].total() == samples]
        assert epochs, corpus.name
        for key in epochs:
            assert set(seen[key].values()) == {1} and len(seen[key]) == samples
            assert learned[key] == whole


def test_the_ledger_answers_both_ways(prepared: Prepared) -> None:
    data, steps = TrainingData(*prepared), 60
    forwards: dict[str, set[tuple[int, int, int]]] = {}
    for step in range(steps):
        for sighting in documents_of_step(data, step):
            place = (sighting.step, sighting.row, sighting.document.start)
            forwards.setdefault(sighting.document.id, set()).add(place)
    for document, places in forwards.items():
        backwards = steps_of_document(data, document, steps)
        assert {(s.step, s.row, s.document.start) for s in backwards} == places
    with pytest.raises(InputError, match="no training document"):
        steps_of_document(data, "one:nothing", steps)


def test_held_out_bytes_are_those_of_the_documents(prepared: Prepared) -> None:
    run, recipe = prepared
    batches = list(validation_batches(run, recipe, 4, 100_000))
    texts = list(validation_texts(run, recipe, 100_000))
    assert sum(size for _, size in batches) == sum(len(text.encode()) for _, text in texts) > 0
    held_out = {name for name, _ in texts}
    trained = {s.document.id for step in range(60) for s in documents_of_step(TrainingData(run, recipe), step)}
    assert held_out and not held_out & trained


def test_inspection_shows_text_and_documents(prepared: Prepared) -> None:
    shown = inspect_data(prepared[0], 0)
    assert "step 0" in shown and "one:" in shown
