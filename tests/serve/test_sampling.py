"""Draws are what the probabilities say, and a function of (seed, request, index)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.recipe.schema import SamplingConfig
from anychip.serve.sampling import candidates, penalize_repetition, uniform_draw
from serve.one_token import choose_token

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0])


def config(**fields: float) -> SamplingConfig:
    return SamplingConfig.model_validate({"temperature": 1.0, **fields})


def test_greedy_takes_the_likeliest() -> None:
    assert choose_token(LOGITS, [], config(temperature=0), 0.99) == 1
    assert choose_token(LOGITS, [], config(temperature=5, top_k=1), 0.99) == 1


@pytest.mark.parametrize(
    "sampling",
    [
        config(),
        config(temperature=0.5),
        config(top_k=3),
        config(top_p=0.8),
        config(top_k=4, top_p=0.7, temperature=2.0),
    ],
)
def test_frequencies_fit_the_probabilities(sampling: SamplingConfig) -> None:
    """Chi-square at p = 0.001, with a fixed seed."""
    count, observed = 4000, torch.zeros(6)
    for index in range(count):
        observed[choose_token(LOGITS, [], sampling, uniform_draw(1, "chi-square", index))] += 1
    expected = expected_probabilities(sampling) * count
    assert (observed[expected == 0] == 0).all()
    likely = expected > 0
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}[int(likely.sum()) - 1]
    assert statistic < critical


def expected_probabilities(sampling: SamplingConfig) -> torch.Tensor:
    scaled = LOGITS / sampling.temperature
    if sampling.top_k:
        scaled = torch.where(scaled >= scaled.sort(descending=True).values[sampling.top_k - 1], scaled, -torch.inf)
    probabilities = scaled.softmax(0)
    kept, mass = torch.zeros(6), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass < sampling.top_p:
            kept[token] = probabilities[token]
            mass += float(probabilities[token])
    return kept / kept.sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 2000),
    spread=st.floats(0.01, 8),
    top_p=st.floats(0.05, 1),
    top_k=st.just(0) | st.integers(0, 2500),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_candidates_are_the_smallest_set_that_reaches_top_p(
    seed: int, size: int, spread: float, top_p: float, top_k: int, draw: float
) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = config(top_p=top_p, top_k=top_k)
    tokens, probabilities = candidates(logits, sampling)
    assert probabilities.sum().item() == pytest.approx(1)
    assert len(set(tokens.tolist())) == len(tokens)
    pool = logits.double().sort(descending=True).values[: top_k or size].softmax(0)
    mass = float(pool[: len(tokens)].sum())
    assert mass >= top_p - 1e-9
    if top_p < 1:
        assert mass - float(pool[len(tokens) - 1]) < top_p + 1e-9
    assert choose_token(logits, [], sampling, draw) in tokens.tolist()


def test_a_flat_distribution_has_many_candidates() -> None:
    tokens, _ = candidates(torch.zeros(5000), config(top_p=0.5))
    assert len(tokens) == pytest.approx(2500, abs=1)


def test_repetition_penalty_lowers_what_was_seen_once() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalize_repetition(logits, [0, 1, 0], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    assert choose_token(logits, [0], config(temperature=0, repetition_penalty=3.0), 0.0) == 2


def test_draws_depend_on_seed_request_and_index_and_on_nothing_else() -> None:
    one = [uniform_draw(1, "a", index) for index in range(2000)]
    assert one == [uniform_draw(1, "a", index) for index in range(2000)]
    assert len(set(one)) == 2000
    assert not set(one) & {uniform_draw(2, "a", index) for index in range(2000)}
    assert not set(one) & {uniform_draw(1, "b", index) for index in range(2000)}
    assert uniform_draw(1, "2:a", 3) != uniform_draw(1, "a", 2)
    assert all(0 <= draw < 1 for draw in one)
    assert sum(one) / len(one) == pytest.approx(0.5, abs=0.03)


def test_the_last_draw_stays_in_the_vocabulary() -> None:
    assert choose_token(torch.full((1000,), -3.0), [], config(), 1 - 2**-53) == 999
