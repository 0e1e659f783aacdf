"""The data stage: read, clean, deduplicate, split, train the tokenizer, pack. Each step is skipped when its inputs
are those of the last time, and continues where it was stopped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anychip.data.corpora import Corpus, foreign_blocks, foreign_token_error, packed_prefix, read_summary
from anychip.data.indexed import IndexedCorpus, bin_path, idx_path, is_packed
from anychip.data.integrity import blocks_path, read_sealed, write_blocks, write_sealed
from anychip.data.loader import TrainingData
from anychip.data.pack import documents_path, pack_corpus
from anychip.data.readers import fingerprint, list_files, nothing_left
from anychip.data.split import Side, draw, hold_one_out
from anychip.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest, train_bpe
from anychip.errors import InputError, UnfitError
from anychip.files import sha256_file, sha256_json, write_json
from anychip.progress import progress
from anychip.recipe.schema import Recipe, SourceConfig
from anychip.rundir import RunDirectory

# Raised when cleaning, splitting or packing change what they write, so that old results are made again.
_FORMAT = 1
_SIDES: tuple[Side, ...] = ("train", "validation")


def prepare_data(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    """Leave tokenizer and packed corpora in `run.data`; returns the summary, also kept as data/summary.json.

    `sources.NAME.{train,validation}` hold counts of documents, tokens and text bytes with digests, `documents` how
    many documents were read, kept and left out for which reason, `tokenizer` its digest and size. The returned
    dictionary also has `seconds` for each step.
    """
    seconds: dict[str, float] = {}
    try:
        summary = _prepare(recipe, run, seconds)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                "the disk is full.", where=run.data, do="Free space and run again; finished parts are kept."
            ) from None
        raise
    write_sealed(run.data / "summary.json", summary)
    return {**summary, "seconds": seconds}


def is_there(recipe: Recipe, run: RunDirectory) -> bool:
    """Whether no file is missing of what `prepare_data` left; whoever finds one damaged is told to remove it."""
    try:
        held = read_summary(run)["sources"]
    except (InputError, UnfitError):
        return False
    files = [run.tokenizer]
    for source in recipe.data.sources:
        if "blocks_sha256" in held.get(source.name, {}):
            files.append(foreign_blocks(run, source.name))
        for side in _SIDES:
            if "blocks_sha256" in held.get(source.name, {}).get(side, {}):
                files += _packed_files(packed_prefix(run, source.name, side))
    return all(path.exists() for path in files)


def _prepare(recipe: Recipe, run: RunDirectory, seconds: dict[str, float]) -> dict[str, Any]:
    texts = [source for source in recipe.data.sources if not is_packed(source)]
    documents_key = ""
    documents: dict[str, int] = {}
    if texts:
        with _timed(seconds, "documents"):
            documents_key, documents = _documents_step(recipe, run, texts)
    with _timed(seconds, "tokenizer"):
        tokenizer = _tokenizer_step(recipe, run, texts, documents_key)
    with _timed(seconds, "packing"):
        sources = {source.name: _pack_source(recipe, run, source, tokenizer, documents_key) for source in texts}
    for source in recipe.data.sources:
        if is_packed(source):
            sources[source.name] = _check_megatron(recipe, run, source)
    return {
        "documents": documents,
        "sources": sources,
        "tokenizer": {
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
    }


def inspect_data(run: RunDirectory, step: int) -> str:
    """The samples of a step as a person reads them: where each comes from, and its text."""
    recipe = run.read_recipe()
    data = TrainingData(run, recipe)
    tokenizer = load_tokenizer(run.tokenizer)
    batch = data.batch(step)
    lines = [f"step {step}: {data.global_batch_size} samples of {data.seq_length} tokens"]
    for sample in data.samples(step):
        lines.append(f"\n=== row {sample.row}: {sample.source}, epoch {sample.epoch}, sample {sample.sample}")
        lines += [f"  {span.id}: tokens {span.start}-{span.start + span.tokens - 1}" for span in sample.documents]
        labels = [token for token in batch.labels[sample.row].tolist() if token >= 0]
        lines.append(tokenizer.decode(labels, skip_special=False))
    return "\n".join(lines)


def _documents_step(recipe: Recipe, run: RunDirectory, sources: list[SourceConfig]) -> tuple[str, dict[str, int]]:
    """Cleaned, split documents in data/documents; returns the key of their inputs and the counts."""
    files = [(source, file) for source in sources for file in list_files(source)]
    config = recipe.data
    key = sha256_json(
        {
            "format": _FORMAT,
            "files": fingerprint([file for _, file in files]),
            "sources": [source.model_dump(mode="json", exclude={"weight"}) for source in sources],
            "cleaning": config.cleaning.model_dump(mode="json"),
            "dedup": config.dedup.model_dump(mode="json"),
            "tasks": config.executor.tasks,
            "validation_fraction": config.validation_fraction,
        }
    )
    folder, work = run.data / "documents", run.data / "work"

    def clean() -> dict[str, int]:
        from anychip.data.pipeline import clean_corpus

        _start_over_on_change(key, work, folder)
        counts = clean_corpus(config, files, work, folder)
        for source in sources:
            if not any((folder / side / source.name).is_dir() for side in _SIDES):
                raise nothing_left(source, Counter(counts))
            if config.validation_fraction:
                hold_one_out(folder / "train" / source.name, folder / "validation" / source.name)
        shutil.rmtree(work)
        left_out = ", ".join(f"{n:,} {why}" for why, n in sorted(counts.items()) if why not in ("read", "kept"))
        kept = f"documents: {counts['read']:,} read, {counts['kept']:,} kept"
        print(f"{kept}; left out: {left_out}" if left_out else kept, file=sys.stderr)
        return counts

    return key, _once(run, "documents", key, [folder], clean)


def _start_over_on_change(key: str, work: Path, documents: Path) -> None:
    """What an interrupted run left is continued only if it comes from the same inputs."""
    mark = work / "inputs.json"
    if not (mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == key):
        for old in (work, documents):
            shutil.rmtree(old, ignore_errors=True)
        write_json(mark, key)


def _tokenizer_step(recipe: Recipe, run: RunDirectory, sources: list[SourceConfig], documents_key: str) -> Tokenizer:
    config = recipe.data.tokenizer
    vocab_size = config.vocab_size or recipe.model.vocab_size
    given = tokenizer_digest(Path(config.path).expanduser()) if config.path else None
    if given is None and not sources:
        raise InputError(
            "data.tokenizer.kind is bpe, but every source is packed already.",
            do="Name the tokenizer that they were packed with: kind json or sentencepiece, and its path.",
        )
    inputs = [documents_key, vocab_size, config.training_bytes] if given is None else [given]

    def make() -> dict[str, str]:
        if config.path:
            tokenizer = load_tokenizer(Path(config.path).expanduser())
        else:
            tokenizer = train_bpe(_training_sample(run, sources, config.training_bytes), vocab_size)
        shutil.rmtree(run.tokenizer, ignore_errors=True)
        tokenizer.save(run.tokenizer)
        return {"digest": tokenizer.digest}

    made = _once(run, "tokenizer", sha256_json([_FORMAT, inputs]), [run.tokenizer], make)
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.digest != made["digest"]:
        do = "Remove it and run `anychip data prepare RECIPE` again."
        raise UnfitError("is not the tokenizer that was made here: its digest differs.", where=run.tokenizer, do=do)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise InputError(
            f"has {tokenizer.vocab_size} pieces, but model.vocab_size is {recipe.model.vocab_size}.",
            where=config.path or run.tokenizer,
            do=f"Set model.vocab_size to at least {tokenizer.vocab_size}.",
        )
    return tokenizer


def _training_sample(run: RunDirectory, sources: list[SourceConfig], wanted_bytes: int) -> Iterator[str]:
    """Training documents, thinned by their digests to about `wanted_bytes`."""
    import orjson

    files = [path for source in sources for path in document_files(run, source, "train")]
    total = sum(path.stat().st_size for path in files)
    share = min(1.0, wanted_bytes / total)
    with progress("training the tokenizer", total, "bytes") as bar:
        for path in files:
            with path.open("rb") as handle:
                for line in handle:
                    text = orjson.loads(line)["text"]
                    bar.advance(len(line))
                    # The split uses the low end of the same draw, so the tokenizer takes the high end.
                    if draw(text) >= 1.0 - share:
                        yield text


def _pack_source(
    recipe: Recipe, run: RunDirectory, source: SourceConfig, tokenizer: Tokenizer, documents_key: str
) -> dict[str, Any]:
    packed: dict[str, Any] = {}
    for side in _SIDES:
        inputs = document_files(run, source, side)
        prefix = packed_prefix(run, source.name, side)
        key = sha256_json([_FORMAT, documents_key, tokenizer.digest, [str(path) for path in inputs]])

        def pack(inputs: list[Path] = inputs, prefix: Path = prefix) -> dict[str, Any]:
            workers = recipe.data.workers or os.cpu_count() or 1
            return asdict(pack_corpus(inputs, prefix, run.tokenizer, workers))

        packed[side] = _once(run, f"packing-{side}-{source.name}", key, _packed_files(prefix), pack)
    return packed


def _packed_files(prefix: Path) -> list[Path]:
    return [bin_path(prefix), idx_path(prefix), blocks_path(prefix), documents_path(prefix)]


def _check_megatron(recipe: Recipe, run: RunDirectory, source: SourceConfig) -> dict[str, Any]:
    """A corpus packed elsewhere stays where it is; its ids must fit the model. What was checked is kept as digests,
    until the corpus is written anew."""
    prefix = Path(source.path).expanduser()
    blocks = foreign_blocks(run, source.name)

    def check() -> dict[str, Any]:
        counts = _check_foreign_tokens(recipe, source)
        digests = {"idx_sha256": sha256_file(idx_path(prefix)), "blocks_sha256": write_blocks(bin_path(prefix), blocks)}
        table = documents_path(prefix)
        return counts | digests | ({"documents_sha256": sha256_file(table)} if table.is_file() else {})

    IndexedCorpus(prefix)  # before its times are asked for: says what is wrong with a corpus that is not there
    written = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (bin_path(prefix), idx_path(prefix))
    ]
    key = sha256_json([_FORMAT, recipe.model.vocab_size, written])
    return _once(run, f"checking-{source.name}", key, [blocks], check)


def _check_foreign_tokens(recipe: Recipe, source: SourceConfig) -> dict[str, Any]:
    corpus = Corpus(source.name, Path(source.path).expanduser())
    if corpus.token_count == 0:
        raise InputError("holds no tokens.", where=source.path, do="Give another corpus, or remove the source.")
    foreign = corpus.packed.foreign_token(recipe.model.vocab_size)
    if foreign is not None:
        raise foreign_token_error(foreign, recipe.model.vocab_size, corpus.prefix)
    return {"documents": corpus.packed.document_count, "tokens": corpus.token_count}


def document_files(run: RunDirectory, source: SourceConfig, side: Side) -> list[Path]:
    """The cleaned documents of one side, as JSON lines with `id` and `text`."""
    return sorted((run.data / "documents" / side / source.name).glob("*.jsonl"))


def _once(
    run: RunDirectory, step: str, key: str, products: list[Path], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The record of a step: kept from an earlier run with the same inputs whose products are all there, or made now."""
    path = run.data / "steps" / f"{step}.json"
    if path.is_file() and all(product.exists() for product in products):
        with suppress(UnfitError):  # a damaged record is made anew
            kept = read_sealed(path, ("inputs", "record"))
            if kept["inputs"] == key:
                record: dict[str, Any] = kept["record"]
                return record
    path.unlink(missing_ok=True)
    record = make()
    write_sealed(path, {"inputs": key, "record": record})
    return record


class _timed:
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.monotonic() - self.started, 3)
