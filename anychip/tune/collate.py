"""Encoded dialogs as the rows of a batch, and what happens to those that fit none."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.tune.encoding import EncodedDialog

_ROUND_UP_TO = 16


def padded(rows: Sequence[EncodedDialog], seq_length: int, tokenizer: Tokenizer) -> Batch:
    """A dialog a row, [rows, longest dialog rounded up to 16 tokens]."""
    longest = max(len(row) for row in rows)
    return _collate([[row] for row in rows], min(-(-longest // _ROUND_UP_TO) * _ROUND_UP_TO, seq_length), tokenizer)


def packed(rows: Sequence[Sequence[EncodedDialog]], seq_length: int, tokenizer: Tokenizer) -> Batch:
    """Several dialogs a row, [rows, seq_length], numbered in `documents` so that none sees another."""
    import torch

    batch = _collate(rows, seq_length, tokenizer)
    documents = torch.full_like(batch.input_ids, -1)
    for index, row in enumerate(rows):
        start = 0
        for number, dialog in enumerate(row):
            documents[index, start : start + len(dialog)] = number
            start += len(dialog)
    return Batch(batch.input_ids, batch.labels, documents)


def _collate(rows: Sequence[Sequence[EncodedDialog]], width: int, tokenizer: Tokenizer) -> Batch:
    import torch

    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_LABEL, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for dialog in row:
            end = start + len(dialog)
            input_ids[index, start:end] = torch.from_numpy(dialog.input_ids)
            labels[index, start:end] = torch.from_numpy(dialog.labels)
            start = end
    return Batch(input_ids, labels)


def judge_too_long(dropped: int, kept: int, what: str, seq_length: int, policy: str, where: str) -> None:
    """Say what is left out because it is too long; refuse where the recipe says so, or where nothing is left."""
    if not kept:
        raise InputError(
            f"holds no {what} of at most {seq_length} tokens, which is the section's seq_length.",
            where=where,
            do=f"Raise seq_length or shorten the {what}s.",
        )
    if dropped and policy == "refuse":
        raise InputError(
            f"{dropped:,} of {dropped + kept:,} {what}s are longer than seq_length {seq_length}.",
            where=where,
            do="Raise seq_length, or set too_long: report to leave them out.",
        )
    if dropped:
        print(f"note: {dropped:,} of {dropped + kept:,} {what}s are longer than {seq_length} tokens and left out",
              file=sys.stderr)  # fmt: skip
