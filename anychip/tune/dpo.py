"""Preference tuning: batches of pairs, and what the reference says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anychip.data.batch import Batch
from anychip.data.tokenizer import load_tokenizer
from anychip.errors import InputError
from anychip.files import atomic_writer
from anychip.recipe import Recipe
from anychip.recipe.schema import DpoConfig
from anychip.rundir import RunDirectory
from anychip.tune.collate import judge_too_long, padded
from anychip.tune.encoding import EncodedDialog, Encoding, encode_dialogs
from anychip.tune.epochs import Epochs, PaddedRows
from anychip.tune.pairs import Pair, load_pairs


class DpoData:
    """The batches of `tune.dpo`, step by step: rows 2 i and 2 i + 1 are a pair, the preferred one first. Only the last
    answer carries labels. `batch(step)` is a pure function of the recipe, the seed and the step."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        """Raises InputError for a recipe without `tune.dpo`, unreadable sources, or pairs that are too long."""
        self.config = dpo_config(recipe)
        self.tokenizer = load_tokenizer(run.tokenizer)
        pairs = load_pairs(self.config.sources, self.config.system_prompt)
        encoding = Encoding(recipe.tune.template, last_answer=True)
        dialogs = [dialog for pair in pairs for dialog in (pair.chosen, pair.rejected)]
        encoded = encode_dialogs(dialogs, self.tokenizer, encoding)
        rows = list(zip(encoded[0::2], encoded[1::2], strict=True))
        fitting = [n for n, row in enumerate(rows) if max(map(len, row)) <= self.config.seq_length]
        paths = ", ".join(source.path for source in self.config.sources)
        judge_too_long(
            len(rows) - len(fitting), len(fitting), "pair", self.config.seq_length, self.config.too_long, paths
        )
        self.pairs: list[Pair] = [pairs[number] for number in fitting]
        self.encoded: list[tuple[EncodedDialog, EncodedDialog]] = [rows[number] for number in fitting]
        self._reference: Tensor | None = None
        numbers: dict[str, int] = {}
        subjects = np.array([numbers.setdefault(pair.chosen.subject, len(numbers)) for pair in self.pairs])
        weights = [source.weight for source in self.config.sources]
        epochs = Epochs(subjects, recipe.seed, np.array([pair.source for pair in self.pairs]), weights)
        lengths = np.array([max(map(len, row)) for row in self.encoded])
        self._rows = PaddedRows(epochs, lengths, self.config.global_batch_size, recipe.seed)

    def numbers(self, step: int) -> list[int]:
        """The pairs of a step."""
        return [int(row[0]) for row in self._rows.rows(step)]

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step` (from 0): [2 x global_batch_size, longest row rounded up to 16 tokens]."""
        return self.of(self.numbers(step))

    def of(self, numbers: list[int]) -> Batch:
        """These pairs as a batch."""
        rows = [row for number in numbers for row in self.encoded[number]]
        batch = padded(rows, self.config.seq_length, self.tokenizer)
        return batch if self._reference is None else replace(batch, reference=self._reference[numbers].flatten())

    def documents(self, step: int) -> list[str]:
        """The first words of the prompts of a step."""
        return list(dict.fromkeys(self.pairs[number].chosen.question[:80] for number in self.numbers(step)))

    def remember_reference(self, log_probabilities: Tensor) -> None:
        """From now on batches bring these, [pairs, 2]."""
        self._reference = log_probabilities

    def digest(self) -> str:
        """SHA-256 of the tokens and labels of all pairs, in order."""
        digest = hashlib.sha256()
        for pair in self.encoded:
            for row in pair:
                digest.update(len(row).to_bytes(8, "little") + row.input_ids.tobytes() + row.labels.tobytes())
        return digest.hexdigest()

    def in_order(self) -> Iterator[tuple[list[int], Batch]]:
        """Every pair once, in batches of the global size; the last one is filled up with the first pairs."""
        size, total = self.config.global_batch_size, len(self.encoded)
        for start in range(0, total, size):
            numbers = [number % total for number in range(start, start + size)]
            yield numbers, self.of(numbers)


def reference_log_probabilities(
    data: DpoData,
    run: RunDirectory,
    weights: str,
    compute: Callable[[Batch], Tensor],
    any_lacks: Callable[[bool], bool],
    *,
    writes: bool,
) -> Tensor:
    """[pairs, 2] fp64: what the starting weights say of each pair, from RUN/dpo/reference.safetensors if it is of
    these `weights` (a digest) and these tokens, else computed and kept there. Called by all processes together."""
    from safetensors.torch import save

    path, identity = run.dpo / "reference.safetensors", f"{weights} {data.digest()}"
    kept = _kept(path, identity, len(data.encoded))
    if not any_lacks(kept is None):
        assert kept is not None
        return kept
    found = torch.zeros(len(data.encoded), 2, dtype=torch.float64)
    for numbers, batch in data.in_order():
        found[numbers] = compute(batch).double().view(-1, 2)
    if writes:
        with atomic_writer(path) as handle:
            handle.write(save({"log_probabilities": found}, {"identity": identity}))
    return found


def _kept(path: object, identity: str, pairs: int) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata: Mapping[str, str] = handle.metadata() or {}
            found: Tensor = handle.get_tensor("log_probabilities")
    except (OSError, SafetensorError):
        return None
    return found if metadata.get("identity") == identity and tuple(found.shape) == (pairs, 2) else None


def dpo_config(recipe: Recipe) -> DpoConfig:
    """The recipe's `tune.dpo`. Raises InputError when it has none."""
    if recipe.tune.dpo is None:
        raise InputError("the recipe has no section tune.dpo.", do="Add it: sources and steps are enough.")
    return recipe.tune.dpo
