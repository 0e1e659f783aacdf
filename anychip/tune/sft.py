"""Supervised tuning: batches of dialogs for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from anychip.data.batch import Batch
from anychip.data.tokenizer import load_tokenizer
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.recipe.schema import ModelConfig, SftConfig
from anychip.rundir import RunDirectory
from anychip.tune.collate import judge_too_long, packed, padded
from anychip.tune.dialogs import Dialog, split_dialogs
from anychip.tune.encoding import EncodedDialog, Encoding, encode_dialogs
from anychip.tune.epochs import Epochs, PackedRows, PaddedRows, Rows
from anychip.tune.sources import load_dialogs


class SftData:
    """The batches of `tune.sft`, step by step: a batch source of the training loop.

    `split` says what is trained and what is held out, `encoded` holds the training samples that fit, `dropped` says how
    many did not fit into `seq_length` and were left out (never cut). `batch(step)` is a pure function of the recipe,
    the seed and the step.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        """Raises InputError for a recipe without `tune.sft`, unreadable sources, or dialogs that are too long."""
        self.config = sft_config(recipe)
        self.tokenizer = load_tokenizer(run.tokenizer)
        self.encoding = Encoding(recipe.tune.template, self.config.loss_on, self.config.parity)
        self.split = split_dialogs(load_dialogs(self.config))
        if self.config.packing:
            check_packing(recipe.final_model, self.config.seq_length)
        encoded = self._encode(self.split.training)
        self.encoded = [sample for sample in encoded if len(sample) <= self.config.seq_length]
        self.dropped = len(encoded) - len(self.encoded)
        self._judge_dropped()
        self._rows = self._order(recipe.seed)

    @property
    def dialogs(self) -> int:
        """Samples of the training set; a dialog whose template drops earlier thoughts makes several."""
        return len(self.encoded)

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step` (from 0): [global_batch_size, seq_length] when packed, else as wide as the
        longest dialog, rounded up to 16 tokens."""
        rows = [[self.encoded[number] for number in row] for row in self._rows.rows(step)]
        if self.config.packing:
            return packed(rows, self.config.seq_length, self.tokenizer)
        return padded([row[0] for row in rows], self.config.seq_length, self.tokenizer)

    def samples(self, step: int) -> list[list[EncodedDialog]]:
        """What each row of a step is made of."""
        return [[self.encoded[number] for number in row] for row in self._rows.rows(step)]

    def dialog(self, sample: EncodedDialog) -> Dialog:
        """The training dialog that a sample comes from."""
        return self.split.training[sample.dialog]

    def documents(self, step: int) -> list[str]:
        """Subjects of the dialogs of a step, or their first words where they have none."""
        dialogs = [self.dialog(sample) for row in self.samples(step) for sample in row]
        return list(dict.fromkeys(d.subject or d.messages[0].content[:80] for d in dialogs))

    def held_out_batches(self, dialogs: Sequence[Dialog]) -> Iterator[tuple[Batch, int]]:
        """Batches of the dialogs that fit, each with the UTF-8 bytes of its answers, for bits per byte."""
        fitting = [sample for sample in self._encode(dialogs) if len(sample) <= self.config.seq_length]
        fitting.sort(key=len)
        for start in range(0, len(fitting), self.config.micro_batch_size):
            part = fitting[start : start + self.config.micro_batch_size]
            answers = [m.content for s in part for m in dialogs[s.dialog].messages if m.role == "assistant"]
            yield padded(part, self.config.seq_length, self.tokenizer), sum(len(text.encode()) for text in answers)

    def _encode(self, dialogs: Sequence[Dialog]) -> list[EncodedDialog]:
        return encode_dialogs(dialogs, self.tokenizer, self.encoding)

    def _order(self, seed: int) -> Rows:
        numbers: dict[str, int] = {}
        dialogs = [self.dialog(sample) for sample in self.encoded]
        subjects = np.array([numbers.setdefault(dialog.subject, len(numbers)) for dialog in dialogs])
        sources = np.array([dialog.source for dialog in dialogs])
        epochs = Epochs(subjects, seed, sources, [source.weight for source in self.config.sources])
        lengths, batch_size = np.array([len(sample) for sample in self.encoded]), self.config.global_batch_size
        if self.config.packing:
            return PackedRows(epochs, lengths, self.config.seq_length, batch_size, seed)
        return PaddedRows(epochs, lengths, batch_size, seed)

    def _judge_dropped(self) -> None:
        paths = ", ".join(source.path for source in self.config.sources)
        judge_too_long(self.dropped, len(self.encoded), "dialog", self.config.seq_length, self.config.too_long, paths)


def check_packing(model: ModelConfig, seq_length: int) -> None:
    """Positions need no restart inside a row, because rotary scores depend on distances alone; but the published rule
    also scales them by the length of the sequence. So packing is exact as far as that scale stays the same."""
    from anychip.model.rope import rope_scale

    if rope_scale(model, seq_length) != rope_scale(model, 1):
        assert model.rope_scaling is not None
        raise InputError(
            f"tune.sft.packing with seq_length {seq_length}: beyond {model.rope_scaling.training_length} tokens the "
            "model scales positions by the length of a row, which is not the length of the dialogs in it.",
            do="Lower tune.sft.seq_length, raise model.rope_scaling.training_length, or set packing to false.",
        )


def sft_config(recipe: Recipe) -> SftConfig:
    """The recipe's `tune.sft`. Raises InputError when it has none."""
    if recipe.tune.sft is None:
        raise InputError("the recipe has no section tune.sft.", do="Add it: steps and sources are enough.")
    return recipe.tune.sft
