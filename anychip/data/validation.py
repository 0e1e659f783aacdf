"""Held-out text, whole documents only, so that bits per byte is exact for any tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anychip import alive
from anychip.data.batch import IGNORE_LABEL, Batch, number_documents
from anychip.data.corpora import Corpus, open_corpora, open_tokenizer, read_summary
from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.recipe.schema import Recipe
from anychip.rundir import RunDirectory


def validation_batches(
    run: RunDirectory, recipe: Recipe, batch_size: int, max_tokens: int
) -> Iterator[tuple[Batch, int]]:
    """Batches [batch_size, seq_length] of held-out documents, each with the UTF-8 bytes of the texts that end in it.

    Every token of the chosen documents is a label once, the first ones behind an end of document. So the sum of the
    nats over all batches, divided by ln 2 and by the sum of the bytes, is bits per byte. The end tokens count no
    bytes; their nats count. Documents are taken in order while they fit into `max_tokens`; rows that are not needed
    carry no loss.
    """
    import torch

    seq_length = recipe.training.seq_length
    end_id = int(read_summary(run)["tokenizer"]["eos_id"])
    tokenizer = open_tokenizer(run)
    chosen = _chosen(run, recipe, max_tokens)
    stream = np.concatenate([corpus.document_tokens(document) for corpus, document in chosen])
    ends = np.cumsum([len(corpus.document_tokens(document)) for corpus, document in chosen])
    sizes = np.asarray([_text_bytes(corpus, document, tokenizer) for corpus, document in chosen], np.int64)
    per_batch = batch_size * seq_length
    for start in range(0, len(stream), per_batch):
        stop = min(start + per_batch, len(stream))
        inputs = np.full(per_batch, end_id, np.int64)
        labels = np.full(per_batch, IGNORE_LABEL, np.int64)
        labels[: stop - start] = stream[start:stop]
        inputs[1 : stop - start] = stream[start : stop - 1]
        if start:
            inputs[0] = stream[start - 1]
        shape = (batch_size, seq_length)
        text_bytes = int(sizes[(ends > start) & (ends <= stop)].sum())
        input_ids = torch.from_numpy(inputs.reshape(shape))
        documents = number_documents(input_ids, end_id) if recipe.training.document_mask else None
        yield Batch(input_ids, torch.from_numpy(labels.reshape(shape)), documents), text_bytes


def validation_texts(run: RunDirectory, recipe: Recipe, max_tokens: int) -> Iterator[tuple[str, str]]:
    """(document id, text) of exactly the documents that `validation_batches` scores with the same limit."""
    tokenizer = open_tokenizer(run)
    for corpus, document in _chosen(run, recipe, max_tokens):
        yield corpus.document_id(document), _text(corpus, document, tokenizer)


def training_texts(run: RunDirectory, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(document id, text) of every training document, for baselines that learn from text."""
    tokenizer = open_tokenizer(run)
    for corpus in open_corpora(run, recipe, "train"):
        for document in range(corpus.first, corpus.last):
            yield corpus.document_id(document), _text(corpus, document, tokenizer)


def _chosen(run: RunDirectory, recipe: Recipe, max_tokens: int) -> list[tuple[Corpus, int]]:
    """Documents of all held-out corpora, each corpus by its weight's share, while they fit; at least one."""
    corpora = open_corpora(run, recipe, "validation")
    if not corpora:
        raise InputError(
            "has no held-out documents.", where=run.root, do="Raise data.validation_fraction, or give more documents."
        )
    weights = {source.name: source.weight for source in recipe.data.sources}
    total = sum(weights[corpus.name] for corpus in corpora)
    chosen: list[tuple[Corpus, int]] = []
    for corpus in corpora:
        left = int(max_tokens * weights[corpus.name] / total)
        for document in range(corpus.first, corpus.last):
            start, stop = corpus.document_range(document)
            if 0 < stop - start <= left:
                chosen.append((corpus, document))
                left -= stop - start
    if not chosen:
        everything = [(corpus, document) for corpus in corpora for document in range(corpus.first, corpus.last)]
        chosen = [min(everything, key=lambda one: len(one[0].document_tokens(one[1])))]
    return chosen


def _text_bytes(corpus: Corpus, document: int, tokenizer: Tokenizer) -> int:
    alive.progressed()
    if corpus.table is not None:
        return int(corpus.table.text_bytes[document])
    return len(_text(corpus, document, tokenizer).encode())


def _text(corpus: Corpus, document: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(corpus.document_tokens(document).tolist())
