"""Supervised tuning: batches of dialogs for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.data.docstrings import documentation_pairs
from anychip.data.tokenizer import load_tokenizer
from anychip.errors import InputError
from anychip.families.messages import Message
from anychip.recipe import Recipe
from anychip.recipe.schema import SftConfig
from anychip.rundir import RunDirectory
from anychip.tune.dialogs import Dialog, question_and_answer, split_dialogs
from anychip.tune.encoding import EncodedDialog, encode_dialogs
from anychip.tune.epochs import EpochOrder
from anychip.tune.read import read_dialogs

_ROUND_UP_TO = 16


class SftData:
    """The batches of `tune.sft`, step by step: a batch source of the training loop.

    `split` says what is trained and what is held out, `encoded` holds the training dialogs that fit, `dropped` says how
    many did not fit into `seq_length` and were left out (never cut). `batch(step)` is a pure function of the recipe,
    the seed and the step.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        """Raises InputError for a recipe without `tune.sft`, an unreadable dataset, or dialogs all too long."""
        self.config = sft_config(recipe)
        self.tokenizer = load_tokenizer(run.tokenizer)
        self.split = split_dialogs(load_dialogs(self.config))
        encoded = self._encode(self.split.training)
        fitting = [row for row, dialog in enumerate(encoded) if len(dialog) <= self.config.seq_length]
        if not fitting:
            raise InputError(
                f"holds no dialog of at most tune.sft.seq_length = {self.config.seq_length} tokens.",
                where=self.config.dataset,
                do="Raise tune.sft.seq_length or shorten the dialogs.",
            )
        self.dropped = len(encoded) - len(fitting)
        self._dialog = fitting
        self.encoded = [encoded[row] for row in fitting]
        lengths = np.array([len(dialog) for dialog in self.encoded])
        numbers: dict[str, int] = {}
        subjects = np.array([numbers.setdefault(self.split.training[row].subject, len(numbers)) for row in fitting])
        self._order = EpochOrder(lengths, subjects, self.config.global_batch_size, recipe.seed)

    @property
    def dialogs(self) -> int:
        """Dialogs of one epoch."""
        return len(self.encoded)

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step` (from 0): [global_batch_size, longest dialog rounded up to 16 tokens]."""
        return self._collate([self.encoded[row] for row in self._order.rows(step)])

    def documents(self, step: int) -> list[str]:
        """Subjects of the dialogs of a step, or their first words where they have none."""
        dialogs = [self.split.training[self._dialog[row]] for row in self._order.rows(step)]
        return list(dict.fromkeys(d.subject or d.messages[0].content[:80] for d in dialogs))

    def held_out_batches(self, dialogs: Sequence[Dialog]) -> Iterator[tuple[Batch, int]]:
        """Batches of the dialogs that fit, each with the UTF-8 bytes of its answers, for bits per byte."""
        pairs = zip(dialogs, self._encode(dialogs), strict=True)
        fitting = sorted((p for p in pairs if len(p[1]) <= self.config.seq_length), key=lambda pair: len(pair[1]))
        for start in range(0, len(fitting), self.config.micro_batch_size):
            part = fitting[start : start + self.config.micro_batch_size]
            answers = (m.content for dialog, _ in part for m in dialog.messages if m.role == "assistant")
            yield self._collate([encoded for _, encoded in part]), sum(len(answer.encode()) for answer in answers)

    def _encode(self, dialogs: Sequence[Dialog]) -> list[EncodedDialog]:
        return encode_dialogs([with_system_prompt(d, self.config.system_prompt) for d in dialogs], self.tokenizer)

    def _collate(self, rows: list[EncodedDialog]) -> Batch:
        import torch

        longest = max(len(row) for row in rows)
        width = min(-(-longest // _ROUND_UP_TO) * _ROUND_UP_TO, self.config.seq_length)
        pad = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORE_LABEL, dtype=torch.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.from_numpy(row.input_ids)
            labels[index, : len(row)] = torch.from_numpy(row.labels)
        return Batch(input_ids, labels)


def sft_config(recipe: Recipe) -> SftConfig:
    """The recipe's `tune.sft`. Raises InputError when it has none."""
    if recipe.tune.sft is None:
        raise InputError("the recipe has no section tune.sft.", do="Add it: steps and dataset are enough.")
    return recipe.tune.sft


def load_dialogs(config: SftConfig) -> list[Dialog]:
    """The dialogs of `tune.sft.dataset` about the wanted subjects, in a fixed order, each question once."""
    if config.dataset == "python:docstrings":
        dialogs = [question_and_answer(pair.question, pair.answer, pair.subject) for pair in documentation_pairs()]
    else:
        dialogs = read_dialogs(Path(config.dataset).expanduser())
    if not config.subjects:
        return dialogs
    kept = [dialog for dialog in dialogs if _is_about(dialog, config.subjects)]
    if not kept:
        raise InputError(
            f"holds no dialog about {', '.join(config.subjects)}.",
            where=config.dataset,
            do="Name modules, classes or functions of the dataset in tune.sft.subjects, or leave it empty.",
        )
    return kept


def _is_about(dialog: Dialog, subjects: Sequence[str]) -> bool:
    return any(dialog.subject == subject or dialog.subject.startswith(f"{subject}.") for subject in subjects)


def with_system_prompt(dialog: Dialog, system_prompt: str) -> Dialog:
    """The dialog under the recipe's system prompt, unless it brings its own."""
    if not system_prompt or dialog.messages[0].role == "system":
        return dialog
    return replace(dialog, messages=(Message("system", system_prompt), *dialog.messages))
