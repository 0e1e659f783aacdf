"""A published model directory into a run, so that a recipe continues from its weights."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from anychip.data.tokenizer import load_tokenizer
from anychip.errors import InputError
from anychip.files import write_json
from anychip.interchange.layout import to_logical
from anychip.interchange.logit_check import check_logits
from anychip.interchange.published import PublishedDirectory
from anychip.progress import progress
from anychip.recipe.schema import ModelConfig, Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore

_NOT_SHAPE = {"preset", "initializer_range", "max_position_embeddings"}


def import_model(source: Path, recipe: Recipe, run: RunDirectory) -> Path:
    """Read `source` into `checkpoints/step-000000` of the run, as fp32, one tensor at a time; returns its directory.

    bf16 and fp16 values are exact in fp32, so exporting again gives the same bytes. Ends with a logit comparison,
    recorded in `RUN/conversion.json`. Raises InputError when the recipe describes another model, UnfitError when the
    logits differ.
    """
    published = PublishedDirectory(source)
    for warning in published.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _check_same_model(published.config, recipe.model, source)
    tokenizer = load_tokenizer(source)
    store = CheckpointStore(run.checkpoints)
    expected = sum(1 for _ in published.tensors())
    with store.stream(0, {"weights_only": True}) as stream, progress("import", expected, "tensors") as bar:
        for tensor in published.tensors():
            for name, part in to_logical(published.config, tensor, published.read(tensor.name)).items():
                stream.add(f"model.{name}", part.float().contiguous())
            bar.advance()
    tokenizer.save(run.tokenizer)
    info = store.open(0)

    def read(name: str) -> Tensor:
        ((_, tensor),) = store.read(info, [f"model.{name}"])
        return tensor

    check = check_logits(published.config, read, published.read, source)
    write_json(run.root / "conversion.json", {"source": str(source), "logit_check": check.as_record()})
    return info.path


def _check_same_model(found: ModelConfig, wanted: ModelConfig, source: Path) -> None:
    theirs, ours = found.model_dump(), wanted.model_dump()
    differing = [name for name in theirs if name not in _NOT_SHAPE and theirs[name] != ours[name]]
    if differing:
        shown = ", ".join(f"{name} {theirs[name]} (recipe: {ours[name]})" for name in differing)
        raise InputError(
            f"is another model than the recipe's: {shown}.",
            where=source,
            do="Set these fields with --set model.FIELD=...",
        )
