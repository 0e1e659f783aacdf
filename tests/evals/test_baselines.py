"""xz and the n-gram model score exactly the bytes and tokens they are given."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from anychip.evals import baselines
from anychip.evals.baselines import ngram_bits, xz_bits_per_byte
from anychip.evals.kneser_ney import KneserNey


def test_xz_is_the_size_of_the_archive_and_of_its_growth() -> None:
    rng = np.random.default_rng(0)
    training, held_out = (bytes(rng.integers(97, 105, size, dtype=np.uint8)) for size in (30_000, 5_000))
    found = xz_bits_per_byte(held_out, training)
    preset = 9 | lzma.PRESET_EXTREME
    alone, before, both = (len(lzma.compress(x, preset=preset)) for x in (held_out, training, training + held_out))
    assert found.cold == pytest.approx(alone * 8 / 5_000)
    assert found.primed == pytest.approx((both - before) * 8 / 5_000)
    assert found.primed_with_bytes == 30_000


def test_xz_gains_from_training_text_that_resembles_the_held_out_text() -> None:
    text = b"".join(b"def method_%d(self): return self.value_%d + 1\n" % (i % 50, i % 37) for i in range(900))
    found = xz_bits_per_byte(text[-6_000:], text[:-6_000])
    assert found.primed is not None and found.primed < found.cold
    assert xz_bits_per_byte(text).primed is None
    with pytest.raises(ValueError, match="no held-out"):
        xz_bits_per_byte(b"", text)


def test_xz_primer_leaves_room_for_the_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "XZ_DICTIONARY_BYTES", 1_000)
    assert xz_bits_per_byte(b"a" * 300, b"b" * 5_000).primed_with_bytes == 700


def test_ngram_scores_labels_with_the_contexts_of_their_own_row() -> None:
    rng = np.random.default_rng(2)
    model = KneserNey.train(rng.integers(0, 20, (10, 200)), vocab_size=20)
    rows = rng.integers(0, 20, (130, 9))
    labels = rows[:, 1:].copy()
    labels[5, 3:] = -100
    bits = ngram_bits(model, rows[:, :-1], labels)
    expected = 0.0
    for number, row in enumerate(rows):
        for position in range(3 if number == 5 else 8):
            expected -= np.log2(model.probabilities(row[None, : position + 2])[0, -1])
    assert bits == pytest.approx(expected)
