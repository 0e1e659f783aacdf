"""The vectorised Kneser-Ney against its definition: sums, and a dictionary implementation on a tiny corpus."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from anychip.evals.kneser_ney import KneserNey


def slow_probability(stream: list[int], vocab_size: int, order: int, context: list[int], token: int) -> float:
    """The textbook formula over dictionaries of tuples, one probability at a time."""
    ngrams = {n: [tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)] for n in range(1, order + 1)}
    counts: dict[int, Counter[tuple[int, ...]]] = {order: Counter(ngrams[order])}
    for n in range(1, order):
        lefts = defaultdict(set)
        for gram in ngrams[n + 1]:
            lefts[gram[1:]].add(gram[0])
        counts[n] = Counter({gram: len(seen) for gram, seen in lefts.items()})

    def discount(n: int, count: int) -> float:
        if count == 0:
            return 0.0
        n1, n2, n3, n4 = (sum(c == k for c in counts[n].values()) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else 0.5
        k, here, above = [(1, n1, n2), (2, n2, n3), (3, n3, n4)][min(count, 3) - 1]
        return max(k - (k + 1) * y * above / here, 0.05) if here else y

    def probability(n: int) -> float:
        if n == 0:
            return 1 / vocab_size
        history = tuple(context[len(context) - n + 1 :]) if n > 1 else ()
        followers = {gram: c for gram, c in counts[n].items() if gram[:-1] == history}
        total = sum(followers.values())
        if total == 0:
            return probability(n - 1)
        freed = sum(discount(n, c) for c in followers.values())
        count = counts[n][(*history, token)]
        return (count - discount(n, count)) / total + freed / total * probability(n - 1)

    return probability(min(order, len(context) + 1))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_agrees_with_a_dictionary_implementation(order: int) -> None:
    rng = np.random.default_rng(order)
    stream = np.minimum(rng.geometric(0.3, 300), 9).astype(np.int32)
    model = KneserNey.train(stream[None], vocab_size=12, order=order)
    assert model.order == order
    rows = rng.integers(0, 12, (6, 9))
    rows[:3] = np.stack([stream[i : i + 9] for i in (0, 50, 291)])
    found = model.probabilities(rows)
    for row, probabilities in zip(rows.tolist(), found, strict=True):
        for i, token in enumerate(row):
            expected = slow_probability(stream.tolist(), 12, order, row[max(0, i - order + 1) : i], token)
            assert probabilities[i] == pytest.approx(expected, rel=1e-5)


def test_no_ngram_crosses_from_one_row_to_the_next() -> None:
    rows = np.random.default_rng(4).integers(0, 6, (40, 7))
    crossed = KneserNey.train(rows.reshape(1, -1), vocab_size=6).probabilities(rows)
    assert not np.allclose(KneserNey.train(rows, vocab_size=6).probabilities(rows), crossed)
    pair = np.array([[0, 1, 2, 3, 4], [5, 5, 5, 5, 5]])
    shares = [KneserNey.train(pair, 6).probabilities(np.array([[4, token]]))[0, 1] for token in range(6)]
    unseen = KneserNey.train(pair, 6).probabilities(np.arange(6)[:, None])[:, 0]
    assert shares == pytest.approx(unseen.tolist())  # nothing ever follows 4, so its context says nothing


def test_probabilities_of_every_token_sum_to_one() -> None:
    rng = np.random.default_rng(3)
    vocab_size = 200
    stream = (rng.zipf(1.4, 20_000) % vocab_size).astype(np.uint16)
    model = KneserNey.train(stream[None], vocab_size)
    seen = np.stack([stream[i : i + 4] for i in rng.integers(0, len(stream) - 4, 20)]).astype(np.int64)
    contexts = np.concatenate([seen, rng.integers(0, vocab_size, (20, 4))])
    for context in contexts:
        for length in range(5):
            rows = np.column_stack([np.tile(context[4 - length :], (vocab_size, 1)), np.arange(vocab_size)])
            last = model.probabilities(rows)[:, -1]
            assert last.min() > 0
            assert last.sum() == pytest.approx(1.0, abs=1e-5)


def test_it_beats_shorter_orders_on_text_it_resembles() -> None:
    rng = np.random.default_rng(5)
    words = rng.integers(0, 50, (30, 6))
    text = np.concatenate(words[rng.integers(0, 30, 2000)])
    train, held_out = text[:10_000], text[10_000:].reshape(20, -1)
    losses = [-np.log2(KneserNey.train(train[None], 50, order).probabilities(held_out)).mean() for order in (1, 2, 5)]
    assert losses[2] < losses[1] < losses[0]


def test_refuses_what_is_not_a_stream_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="outside"):
        KneserNey.train(np.array([[0, 1, 2, 3, 4, 12]]), vocab_size=12)
    with pytest.raises(ValueError, match="at least 5"):
        KneserNey.train(np.array([[0, 1]]), vocab_size=12)
    model = KneserNey.train(np.arange(10)[None], vocab_size=12)
    with pytest.raises(ValueError, match="outside"):
        model.probabilities(np.array([[1, 99]]))
