from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.data.mixture import Permutation, Turns
from anychip.data.schedule import Schedule

WEIGHTS = st.lists(
    st.one_of(st.integers(0, 20).map(float), st.sampled_from([0.01, 0.3, 0.75, 1 / 3, 2.125])), min_size=1, max_size=6
).filter(any)


@settings(deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_permutation_reaches_everything_once(size: int, key: str) -> None:
    order = Permutation(size, key)
    moved = order(np.arange(size))
    assert sorted(moved.tolist()) == list(range(size))
    for index in {0, size // 2, size - 1}:
        assert order.inverse(int(moved[index])) == index


def test_permutation_mixes_and_follows_its_key() -> None:
    size = 10_000
    indices = np.arange(size)
    moved = Permutation(size, "a")(indices)
    assert abs(np.corrcoef(indices, moved)[0, 1]) < 0.05
    assert np.mean(moved == Permutation(size, "b")(indices)) < 0.01
    gaps = np.abs(np.diff(moved))
    assert np.mean(gaps < 100) < 0.05, "neighbours must not stay neighbours"


def test_permutation_of_a_trillion_needs_no_table() -> None:
    order = Permutation(10**12 + 7, "key")
    moved = order(np.array([0, 5 * 10**11, 10**12 + 6]))
    assert [order.inverse(int(value)) for value in moved] == [0, 5 * 10**11, 10**12 + 6]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_every_corpus_has_its_share_at_every_place(weights: list[float]) -> None:
    turns = Turns(weights)
    places = np.arange(min(2 * turns.period, 3000))
    corpus, rank = turns.corpus(places), turns.rank(places)
    for number, share in enumerate(np.asarray(weights) / sum(weights)):
        mine = np.flatnonzero(corpus == number)
        assert rank[mine].tolist() == list(range(len(mine)))
        counts = np.cumsum(corpus == number)
        # Rounding to 65,536 parts moves a share by at most a part of a period.
        assert np.all(np.abs(counts - (places + 1) * share) < 1 + (places + 1) / (1 << 15) + 1e-9)
        for turn in range(0, len(mine), 97):
            assert turns.place(number, turn) == mine[turn]
            assert turns.count(number, int(mine[turn])) == turn


def test_whole_weights_give_exact_shares() -> None:
    turns = Turns([3.0, 1.0])
    assert turns.period == 4
    assert Counter(turns.corpus(np.arange(4000)).tolist()) == {0: 3000, 1: 1000}
    assert Turns([0.7, 0.2, 0.1]).period == 10


def test_far_places_are_found_at_once() -> None:
    turns = Turns([0.37, 0.63])
    far = 10**15
    assert turns.count(0, far) + turns.count(1, far) == far
    assert turns.count(0, far) == 37 * 10**13
    assert int(turns.rank(np.array([far]))[0]) == turns.count(int(turns.corpus(np.array([far]))[0]), far)


SCHEDULES = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(1, 40), min_size=1, max_size=4),
        "batch": st.integers(1, 9),
        "seed": st.integers(0, 2**62),
        "change": st.one_of(st.none(), st.tuples(st.integers(1, 20), st.integers(0, 3))),
    }
)


def _schedule(counts: list[int], batch: int, seed: int, change: tuple[int, int] | None) -> Schedule:
    names = [f"corpus{number}" for number in range(len(counts))]
    changes = [(0, {name: number + 1.0 for number, name in enumerate(names)})]
    if change:
        step, silenced = change
        weights = {name: float(number != silenced) for number, name in enumerate(names)}
        if any(weights.values()):
            changes += [(step, weights), (step + 2, changes[0][1])]
    return Schedule(names, counts, changes, batch, seed)


@settings(max_examples=40, deadline=None)
@given(SCHEDULES)
def test_epochs_are_exact_across_changes_of_weight(fields: dict[str, object]) -> None:
    schedule = _schedule(**fields)  # type: ignore[arg-type]
    counts: list[int] = fields["counts"]  # type: ignore[assignment]
    end = 200
    places = schedule.locate(0, end)
    for corpus, count in enumerate(counts):
        mine = places.corpus == corpus
        samples, epochs = places.sample[mine].tolist(), places.epoch[mine].tolist()
        assert epochs == [n // count for n in range(len(epochs))], "epochs follow one another without gaps"
        for epoch in range(len(samples) // count):
            assert sorted(samples[epoch * count : (epoch + 1) * count]) == list(range(count))
        begun = samples[len(samples) // count * count :]
        assert len(set(begun)) == len(begun), "an epoch that has begun repeats nothing"


@settings(max_examples=40, deadline=None)
@given(SCHEDULES, st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_any_cut_of_the_places_gives_the_same(fields: dict[str, object], cuts: list[int]) -> None:
    """The same order for any number of ranks, and from any step on."""
    schedule = _schedule(**fields)  # type: ignore[arg-type]
    whole = schedule.locate(0, 200)
    edges = [0, *sorted(cuts), 200]
    for name in ("corpus", "epoch", "sample"):
        parts = [getattr(schedule.locate(a, b), name) for a, b in pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), getattr(whole, name))


@settings(max_examples=30, deadline=None)
@given(SCHEDULES)
def test_the_way_back_is_the_way_there(fields: dict[str, object]) -> None:
    schedule = _schedule(**fields)  # type: ignore[arg-type]
    counts: list[int] = fields["counts"]  # type: ignore[assignment]
    end = 300
    places = schedule.locate(0, end)
    for corpus in range(len(counts)):
        for sample in range(min(counts[corpus], 5)):
            there = np.flatnonzero((places.corpus == corpus) & (places.sample == sample)).tolist()
            assert [place for place, _ in schedule.places_of(corpus, sample, end)] == there
    step = 11
    drawn = schedule.drawn(step)
    before = places.corpus[: step * schedule.global_batch_size]
    if step * schedule.global_batch_size <= end:
        assert drawn == {name: int((before == number).sum()) for number, name in enumerate(schedule.names)}


def test_seeds_give_different_orders() -> None:
    orders = {tuple(_schedule([40], 4, seed, None).locate(0, 40).sample.tolist()) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("step", [10**6, 10**9, 10**12])
def test_far_steps_need_no_history(step: int) -> None:
    schedule = _schedule([10**9, 10**7], 1024, 1, (10, 5))
    places = schedule.locate(step * 1024, (step + 1) * 1024)
    assert set(places.corpus.tolist()) == {0, 1}
    assert places.sample.max() < 10**9
