"""Batches of training: batch(step) is a pure function of (recipe, seed, step).

A sample is `seq_length` predictions out of the stream of a corpus's documents. Its labels are tokens
[s * seq_length, (s + 1) * seq_length) of the stream and its inputs the tokens before them, so neighbouring samples
overlap by one token, as in Megatron. Before the first token stands the end of a document. Every token is a label
exactly once an epoch; the last sample of a corpus is filled up with positions that carry no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.data.batch import IGNORE_LABEL, Batch, number_documents
from anychip.data.corpora import Corpus, DocumentSpan, foreign_token_error, open_corpora, read_summary
from anychip.data.indexed import foreign_token
from anychip.data.schedule import Schedule
from anychip.data.validation import validation_batches
from anychip.errors import InputError
from anychip.recipe.schema import Recipe
from anychip.rundir import RunDirectory

__all__ = ["Sample", "TrainingData", "validation_batches"]


@dataclass(frozen=True)
class Sample:
    """One row of a global batch: which predictions of which corpus, and the documents they come from."""

    step: int
    row: int
    source: str
    epoch: int
    sample: int
    documents: list[DocumentSpan]


class TrainingData:
    """The training side of a run's data, as a source of batches."""

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self.seq_length = recipe.training.seq_length
        self.global_batch_size = recipe.training.global_batch_size
        self.vocab_size = recipe.model.vocab_size
        self._end_id = int(read_summary(run)["tokenizer"]["eos_id"])
        self.corpora = open_corpora(run, recipe, "train")
        present = {corpus.name for corpus in self.corpora}
        if absent := [source.name for source in recipe.data.sources if source.name not in present]:
            raise InputError(
                f"source {absent[0]} has no training documents.",
                where=run.root,
                do="Lower data.validation_fraction, or remove the source.",
            )
        self._document_mask = recipe.training.document_mask
        if self._document_mask:
            for corpus in self.corpora:
                self._check_end_tokens(corpus)
        counts = [-(-corpus.token_count // self.seq_length) for corpus in self.corpora]
        self.schedule = Schedule.of_recipe(recipe, counts)

    def batch(self, step: int) -> Batch:
        """The whole global batch of a step, counted from 0: [global_batch_size, seq_length]."""
        return self.rows(step, 0, self.global_batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of the global batch of a step, reading nothing else: [stop - start, seq_length]."""
        import torch

        first = step * self.global_batch_size
        places = self.schedule.locate(first + start, first + stop)
        inputs = np.full((stop - start, self.seq_length), self._end_id, np.int64)
        labels = np.full((stop - start, self.seq_length), IGNORE_LABEL, np.int64)
        for row, (corpus, sample) in enumerate(zip(places.corpus, places.sample, strict=True)):
            self._fill(self.corpora[corpus], int(sample), inputs[row], labels[row])
        input_ids = torch.from_numpy(inputs)
        documents = number_documents(input_ids, self._end_id) if self._document_mask else None
        return Batch(input_ids, torch.from_numpy(labels), documents)

    def documents(self, step: int) -> list[str]:
        """Ids of the documents of a step, each once, in the order of rows."""
        return list(dict.fromkeys(span.id for sample in self.samples(step) for span in sample.documents))

    def samples(self, step: int) -> list[Sample]:
        """What the rows of a step are made of."""
        first = step * self.global_batch_size
        places = self.schedule.locate(first, first + self.global_batch_size)
        rows = zip(places.corpus.tolist(), places.epoch.tolist(), places.sample.tolist(), strict=True)
        return [
            Sample(step, row, self.corpora[corpus].name, epoch, sample, self._documents(self.corpora[corpus], sample))
            for row, (corpus, epoch, sample) in enumerate(rows)
        ]

    def _check_end_tokens(self, corpus: Corpus) -> None:
        if corpus.tokens(corpus.token_count - 1, corpus.token_count)[0] != self._end_id:
            raise InputError(
                f"does not end its documents with token {self._end_id}, by which training.document_mask tells them "
                "apart.",
                where=corpus.prefix,
                do="Pack it with an end-of-document token, or set training.document_mask=false.",
            )

    def _bounds(self, corpus: Corpus, sample: int) -> tuple[int, int]:
        start = sample * self.seq_length
        return start, min(start + self.seq_length, corpus.token_count)

    def _documents(self, corpus: Corpus, sample: int) -> list[DocumentSpan]:
        return corpus.documents_between(*self._bounds(corpus, sample))

    def _fill(self, corpus: Corpus, sample: int, inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
        start, stop = self._bounds(corpus, sample)
        size = stop - start
        tokens = corpus.tokens(max(start - 1, 0), stop)
        foreign = foreign_token(tokens, self.vocab_size)
        if foreign is not None:
            raise foreign_token_error(foreign, self.vocab_size, corpus.prefix)
        labels[:size] = tokens[-size:]
        if start:
            inputs[:size] = tokens[:-1]
        else:
            inputs[1:size] = tokens[:-1]
