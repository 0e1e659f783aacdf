"""The text a run has trained on, as rivals of the model may learn from it too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.data.corpora import read_summary
from anychip.data.loader import TrainingData
from anychip.data.tokenizer import Tokenizer
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

_PIECE_ROWS = 256


@dataclass(frozen=True)
class TrainingText:
    """Samples that the first steps of a run have read, each once, in the order of the corpus.

    rows: token ids [samples, 1 + seq_length]; the first of a row is its context, as the model had it.
    distinct_tokens: tokens of all distinct samples that were read, of which `rows` may be a part.
    """

    rows: npt.NDArray[np.int32]
    distinct_tokens: int

    @property
    def tokens(self) -> int:
        return self.rows[:, 1:].size

    def text(self, tokenizer: Tokenizer) -> bytes:
        """The samples as text in UTF-8, one after another."""
        pieces = (self.rows[start : start + _PIECE_ROWS, 1:] for start in range(0, len(self.rows), _PIECE_ROWS))
        return "".join(tokenizer.decode(piece.ravel().tolist()) for piece in pieces).encode("utf-8", "replace")


def read_training_text(run: RunDirectory, recipe: Recipe, steps: int, max_tokens: int) -> TrainingText:
    """What the first `steps` steps have read: every sample once, evenly thinned to about `max_tokens` tokens.

    A corpus's last sample, which may be shorter than the others, is left out.
    """
    data = TrainingData(run, recipe)
    length = data.seq_length
    places = data.schedule.locate(0, steps * data.global_batch_size)
    seen = np.unique(np.stack([places.corpus, places.sample]), axis=1)
    whole = np.array([corpus.token_count // length for corpus in data.corpora])
    seen = seen[:, seen[1] < whole[seen[0]]]
    stride = max(-(-seen.shape[1] * length // max_tokens), 1)
    kept = seen[:, ::stride]
    rows = np.full((kept.shape[1], 1 + length), read_summary(run)["tokenizer"]["eos_id"], dtype=np.int32)
    for row, (corpus, sample) in zip(rows, kept.T.tolist(), strict=True):
        start = sample * length
        tokens = data.corpora[corpus].tokens(max(start - 1, 0), start + length)
        row[-len(tokens) :] = tokens
    return TrainingText(rows, seen.shape[1] * length)
