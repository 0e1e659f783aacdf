"""`anychip eval`: held-out bits per byte of a run's pretrained model, beside rivals on the very same text."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anychip.errors import InputError
from anychip.files import write_json
from anychip.progress import progress
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

if TYPE_CHECKING:
    from anychip.data.batch import Batch
    from anychip.evals.training_text import TrainingText
    from anychip.model.decoder import Decoder

NGRAM_ORDER = 5
RIVAL_TRAINING_TOKENS = 8_000_000  # bounds the n-gram model's memory (about 1 GB) and time (about 20 s)


@dataclass(frozen=True)
class HeldOutText:
    """The held-out documents of a run: as batches for models of tokens, as text for everything else."""

    batches: list[tuple[Batch, int]]
    text: bytes

    @cached_property
    def utf8_bytes(self) -> int:
        return sum(size for _, size in self.batches)

    @cached_property
    def input_ids(self) -> npt.NDArray[np.int64]:
        return np.concatenate([batch.input_ids.numpy() for batch, _ in self.batches])

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.concatenate([batch.labels.numpy() for batch, _ in self.batches])


def evaluate_run(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Measure the newest pretraining checkpoint and, with `eval.baselines`, xz and a 5-gram model; write `eval.json`.

    The record has `step` and `compute_dtype` of the model, `held_out` (tokens, utf8_bytes, sha256), `model` and `ngram`
    (bits_per_byte, nats_per_token), `xz` (cold, primed), `training_text` (what the rivals learned from) and `seconds`.
    Raises InputError for a run without packed data or without a checkpoint.
    """
    from anychip.data.validation import validation_batches, validation_texts

    limit = recipe.eval.max_tokens
    text = "".join(text for _, text in validation_texts(run, recipe, limit)).encode("utf-8", "replace")
    held_out = HeldOutText(list(validation_batches(run, recipe, recipe.training.micro_batch_size, limit)), text)
    started = time.monotonic()
    record = _evaluate_model(run, recipe, held_out)
    record["seconds"] = {"model": round(time.monotonic() - started, 3)}
    record["held_out"] = {
        "tokens": int((held_out.labels >= 0).sum()),
        "utf8_bytes": held_out.utf8_bytes,
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    if recipe.eval.baselines:
        _add_rivals(record, run, recipe, held_out)
    write_json(run.evaluation, record)
    return record


def load_pretrained(run: RunDirectory, recipe: Recipe) -> tuple[Decoder, int]:
    """The newest pretraining checkpoint as a model in the recipe's compute dtype, and its step."""
    from anychip.chips.backend import detect_backend
    from anychip.model.decoder import Decoder
    from anychip.train.checkpoint import CheckpointStore
    from anychip.train.precision import compute_dtype

    store = CheckpointStore(run.checkpoints)
    newest = store.latest()
    if newest is None:
        raise InputError("holds no checkpoint to evaluate.", where=run.checkpoints, do="Run `anychip train` first.")
    backend = detect_backend()
    model = Decoder(recipe.final_model, compute_dtype(recipe.training.compute_dtype, backend)).to(backend.device(0))
    store.load(newest, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model, newest.step


def _evaluate_model(run: RunDirectory, recipe: Recipe, held_out: HeldOutText) -> dict[str, Any]:
    from anychip.evals.bits_per_byte import evaluate_bits_per_byte

    model, step = load_pretrained(run, recipe)
    with progress("bits per byte", total=len(held_out.batches), unit="batches") as bar:

        def watched() -> Iterator[tuple[Batch, int]]:
            for item in held_out.batches:
                yield item
                bar.advance()

        measured = evaluate_bits_per_byte(model, watched(), recipe.training.loss_chunk_tokens)
    return {
        "step": step,
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "model": {"bits_per_byte": measured.bits_per_byte, "nats_per_token": measured.nats_per_token},
    }


def _add_rivals(record: dict[str, Any], run: RunDirectory, recipe: Recipe, held_out: HeldOutText) -> None:
    """What xz and the n-gram model need for the same text, after the text that the model has trained on."""
    from anychip.data.tokenizer import load_tokenizer
    from anychip.evals.baselines import xz_bits_per_byte
    from anychip.evals.training_text import read_training_text

    training = read_training_text(run, recipe, record["step"], RIVAL_TRAINING_TOKENS)
    if training.tokens:
        started = time.monotonic()
        record["ngram"] = _evaluate_ngram(recipe, training, held_out)
        record["seconds"]["ngram"] = round(time.monotonic() - started, 3)
    started = time.monotonic()
    primer = training.text(load_tokenizer(run.tokenizer))
    xz = xz_bits_per_byte(held_out.text, primer)
    record["xz"] = {"cold": xz.cold, "primed": xz.primed, "primed_with_bytes": xz.primed_with_bytes}
    record["seconds"]["xz"] = round(time.monotonic() - started, 3)
    record["training_text"] = {
        "tokens": training.tokens,
        "distinct_tokens_read": training.distinct_tokens,
        "utf8_bytes": len(primer),
        "sha256": hashlib.sha256(primer).hexdigest(),
    }


def _evaluate_ngram(recipe: Recipe, training: TrainingText, held_out: HeldOutText) -> dict[str, Any]:
    from anychip.evals.baselines import ngram_bits
    from anychip.evals.kneser_ney import KneserNey

    order = min(NGRAM_ORDER, training.rows.shape[1])
    model = KneserNey.train(training.rows, recipe.final_model.vocab_size, order)
    bits = ngram_bits(model, held_out.input_ids, held_out.labels)
    return {
        "order": order,
        "bits_per_byte": bits / held_out.utf8_bytes,
        "nats_per_token": bits * math.log(2) / int((held_out.labels >= 0).sum()),
        "training_tokens": training.tokens,
    }
