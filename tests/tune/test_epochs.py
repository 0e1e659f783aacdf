"""Epochs are exact, steps are pure functions, and batches need little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.tune.epochs import EpochOrder

SUBJECTS = np.arange(1000) // 4
NOTHING = np.array([], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(dialogs=st.integers(1, 300), batch_size=st.integers(1, 17), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_reads_every_dialog_exactly_once(dialogs: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = EpochOrder(rng.integers(1, 100, dialogs), rng.integers(0, 40, dialogs), batch_size, seed)
    steps = -(-3 * dialogs // batch_size)
    read = np.concatenate([order.rows(step) for step in range(steps)])
    for epoch in range(3):
        part = read[epoch * dialogs : (epoch + 1) * dialogs]
        assert sorted(part.tolist()) == list(range(dialogs))


def test_a_step_does_not_depend_on_what_was_read_before() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    forwards, fresh = EpochOrder(lengths, SUBJECTS, 8, 5), EpochOrder(lengths, SUBJECTS, 8, 5)
    read = [forwards.rows(step) for step in range(400)]
    assert all(np.array_equal(read[step], fresh.rows(step)) for step in (399, 0, 130, 124, 126))
    assert not np.array_equal(EpochOrder(lengths, SUBJECTS, 8, 6).rows(0), read[0])
    assert not np.array_equal(forwards.epoch(0), forwards.epoch(1))


def test_an_epoch_meets_every_subject_before_it_returns_to_one() -> None:
    order = EpochOrder(np.random.default_rng(0).integers(1, 200, 1000), SUBJECTS, 10, 3)
    for epoch in range(2):
        for number in range(4):
            part = order.epoch(epoch)[number * 250 : (number + 1) * 250]
            missing = 250 - len(set(SUBJECTS[part].tolist()))
            assert missing <= 90  # sorting by length moves dialogs inside runs of 320, which cross a round's end
    one_run = EpochOrder(np.ones(1000, dtype=np.int64), SUBJECTS, 1, 3)
    assert len(set(SUBJECTS[one_run.epoch(0)[:224]].tolist())) == 224


def test_batches_hold_dialogs_of_similar_length_in_every_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 257, 1003)
    order = EpochOrder(lengths, np.arange(1003), 8, 1)
    batches = [lengths[order.rows(step)] for step in range(3 * 1003 // 8)]
    padding = sum(len(batch) * batch.max() - batch.sum() for batch in batches) / sum(batch.sum() for batch in batches)
    assert padding < 0.1
    first = [batch.mean() for batch in batches[:60]]
    assert abs(np.corrcoef(first, range(60))[0, 1]) < 0.4


def test_refuses_an_empty_set() -> None:
    with pytest.raises(ValueError, match="needs dialogs"):
        EpochOrder(NOTHING, NOTHING, 8, 0)
