"""Epochs are exact, steps are pure functions, batches need little padding, packed rows are full."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.tune.epochs import Epochs, PackedRows, PaddedRows, best_fit

SUBJECTS = np.arange(1000) // 4
NOTHING = np.array([], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(dialogs=st.integers(1, 300), batch_size=st.integers(1, 17), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_reads_every_dialog_exactly_once(dialogs: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, epochs = rng.integers(1, 100, dialogs), Epochs(rng.integers(0, 40, dialogs), seed)
    rows = PaddedRows(epochs, lengths, batch_size, seed)
    steps = -(-3 * dialogs // batch_size)
    read = np.concatenate([row for step in range(steps) for row in rows.rows(step)])
    for epoch in range(3):
        part = read[epoch * dialogs : (epoch + 1) * dialogs]
        assert sorted(part.tolist()) == list(range(dialogs))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5]), min_size=3, max_size=3),
    batch_size=st.integers(1, 9),
    packing=st.booleans(),
)
def test_a_source_of_weight_w_is_read_w_times_an_epoch(
    sizes: list[int], weights: list[float], batch_size: int, packing: bool
) -> None:
    weights = weights[: len(sizes)]
    sources = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.random.default_rng(0).integers(1, 20, len(sources))
    epochs = Epochs(np.arange(len(sources)), 3, sources, weights)
    rows = PackedRows(epochs, lengths, 32, batch_size, 3) if packing else PaddedRows(epochs, lengths, batch_size, 3)
    counts = np.zeros(len(sources), dtype=int)
    for epoch in range(5):
        found = rows.epoch(epoch)
        for dialog in np.concatenate(found) if packing and len(found) else found:
            counts[int(dialog)] += 1
        for source, weight in enumerate(weights):
            read = counts[sources == source]
            assert read.sum() == int((epoch + 1) * Fraction(weight) * sizes[source])
            assert read.max() - read.min() <= 1
    for position in range(epochs.start(5)):
        epoch = epochs.find(position)
        assert epochs.start(epoch) <= position < epochs.start(epoch + 1)


@settings(max_examples=60, deadline=None)
@given(dialogs=st.integers(1, 200), batch_size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_packed_rows_hold_every_dialog_of_an_epoch_once_and_whole(dialogs: int, batch_size: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, dialogs)
    rows = PackedRows(Epochs(np.arange(dialogs), seed), lengths, 64, batch_size, seed)
    flat = [row for step in range(60) for row in rows.rows(step)]
    ends = np.cumsum([len(rows.epoch(epoch)) for epoch in range(8)])
    assert all(lengths[row].sum() <= 64 for row in flat)
    for start, end in zip([0, *ends], ends, strict=False):
        if end <= len(flat):
            assert sorted(np.concatenate(flat[start:end]).tolist()) == list(range(dialogs))
    fresh = PackedRows(Epochs(np.arange(dialogs), seed), lengths, 64, batch_size, seed)
    for step in (59, 0, 31):
        assert all(map(np.array_equal, fresh.rows(step), flat[step * batch_size : (step + 1) * batch_size]))


def test_packed_rows_are_full() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 5000)
    rows = PackedRows(Epochs(np.arange(5000), 1), lengths, 512, 8, 1).epoch(0)
    assert lengths.sum() / (512 * len(rows)) > 0.97


def test_best_fit_takes_the_fullest_row_that_still_has_room() -> None:
    assert best_fit(np.arange(5), np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match="longer than a row"):
        PackedRows(Epochs(np.arange(2), 0), np.array([3, 9]), 8, 1, 0)


def test_a_step_does_not_depend_on_what_was_read_before() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    forwards, fresh = (PaddedRows(Epochs(SUBJECTS, 5), lengths, 8, 5) for _ in range(2))
    read = [forwards.rows(step) for step in range(400)]
    assert all(np.array_equal(read[step], fresh.rows(step)) for step in (399, 0, 130, 124, 126))
    assert not np.array_equal(PaddedRows(Epochs(SUBJECTS, 6), lengths, 8, 6).rows(0), read[0])
    assert not np.array_equal(forwards.epoch(0), forwards.epoch(1))


def test_an_epoch_meets_every_subject_before_it_returns_to_one() -> None:
    order = PaddedRows(Epochs(SUBJECTS, 3), np.random.default_rng(0).integers(1, 200, 1000), 10, 3)
    for epoch in range(2):
        for number in range(4):
            part = order.epoch(epoch)[number * 250 : (number + 1) * 250]
            missing = 250 - len(set(SUBJECTS[part].tolist()))
            assert missing <= 90  # sorting by length moves dialogs inside runs of 320, which cross a round's end
    one_run = PaddedRows(Epochs(SUBJECTS, 3), np.ones(1000, dtype=np.int64), 1, 3)
    assert len(set(SUBJECTS[one_run.epoch(0)[:224]].tolist())) == 224


def test_batches_hold_dialogs_of_similar_length_in_every_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 257, 1003)
    order = PaddedRows(Epochs(np.arange(1003), 1), lengths, 8, 1)
    batches = [lengths[np.concatenate(order.rows(step))] for step in range(3 * 1003 // 8)]
    padding = sum(len(batch) * batch.max() - batch.sum() for batch in batches) / sum(batch.sum() for batch in batches)
    assert padding < 0.1
    first = [batch.mean() for batch in batches[:60]]
    assert abs(np.corrcoef(first, range(60))[0, 1]) < 0.4


def test_refuses_an_empty_set() -> None:
    with pytest.raises(ValueError, match="needs dialogs"):
        Epochs(NOTHING, 0)
