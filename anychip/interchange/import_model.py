"""A published model directory into a run, so that a recipe continues from its weights."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from anychip.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest
from anychip.errors import InputError
from anychip.families.telechat2 import same_scaling
from anychip.files import write_json
from anychip.interchange.layout import logical_tensors
from anychip.interchange.load import check_tokenizer_fits
from anychip.interchange.logit_check import check_logits
from anychip.interchange.published import PublishedDirectory
from anychip.progress import progress
from anychip.recipe.schema import ModelConfig, Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.directory import retire

# A longer or shorter context and another way to start are the recipe's choice; for rope_scaling see `same_scaling`.
# Losses of the router and of further tokens, a capacity and dropout are of training: what a published configuration
# says of them, if anything, binds nobody.
_COMPARED_OTHERWISE = {
    *("preset", "initializer_range", "max_position_embeddings", "rope_scaling"),
    *("router_aux_loss_coef", "router_z_loss_coef", "moe_capacity_factor", "mtp_loss_scaling_factor"),
    "hidden_dropout",
}


def import_model(source: Path, recipe: Recipe, run: RunDirectory) -> Path:
    """Read `source` into `checkpoints/step-000000` of the run, as fp32, one tensor at a time; returns its directory.

    bf16 and fp16 values are exact in fp32, so exporting again gives the same bytes. Ends with a logit comparison,
    recorded in `RUN/import.json`. Raises InputError when the recipe describes another model or another tokenizer,
    UnfitError when the logits differ; neither leaves a checkpoint.
    """
    published = PublishedDirectory(source)
    for warning in published.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _check_same_model(published.config, recipe.model, source)
    tokenizer = load_tokenizer(source)
    check_tokenizer_fits(tokenizer, published.config, source)
    _check_same_tokenizer(tokenizer, recipe, run, source)
    store = CheckpointStore(run.model_checkpoints(recipe, 0))
    expected = sum(1 for tensor in published.tensors() if not tensor.repeats)
    with store.stream(0, {"weights_only": True}) as stream, progress("import", expected, "tensors") as bar:

        def read_published(name: str) -> Tensor:
            bar.advance()
            return published.read(name)

        for name, tensor in logical_tensors(published.config, published.tensors(), read_published):
            stream.add(f"model.{name}", tensor.float().contiguous())
    info = store.open(0)

    def read(name: str) -> Tensor:
        ((_, tensor),) = store.read(info, [f"model.{name}"])
        return tensor

    try:
        check = check_logits(published.config, read, published.read, source)
        _keep_tokenizer(tokenizer, run)
        write_json(run.root / "import.json", {"source": str(source), "logit_check": check.as_record()})
    except OSError as error:
        retire(info.path)
        raise InputError(f"could not be written ({error.strerror}).", where=run.root, do="Free space there.") from None
    except BaseException:
        retire(info.path)
        raise
    return info.path


def _check_same_tokenizer(tokenizer: Tokenizer, recipe: Recipe, run: RunDirectory, source: Path) -> None:
    """Weights mean nothing with other ids, so whatever the recipe prepares data with must be the model's tokenizer."""
    chosen = recipe.data.tokenizer
    if (run.tokenizer / tokenizer.file_name).is_file():
        where, same = str(run.tokenizer), tokenizer_digest(run.tokenizer) == tokenizer.digest
    elif chosen.path is not None:
        path = Path(chosen.path).expanduser()
        where, same = chosen.path, tokenizer_digest(path) == tokenizer.digest
    else:
        where, same = "a new one, trained on the corpus", False
    if not same:
        kind = "json" if tokenizer.file_name == "tokenizer.json" else "sentencepiece"
        raise InputError(
            f"needs its own tokenizer, and the recipe uses another ({where}).",
            where=source,
            do=f"Set --set data.tokenizer.kind={kind} --set data.tokenizer.path={source / tokenizer.file_name}, "
            "and a name that no run has yet.",
        )


def _keep_tokenizer(tokenizer: Tokenizer, run: RunDirectory) -> None:
    if not (run.tokenizer / tokenizer.file_name).is_file():
        tokenizer.save(run.tokenizer)


def _check_same_model(found: ModelConfig, wanted: ModelConfig, source: Path) -> None:
    theirs, ours = found.model_dump(), wanted.model_dump()
    differing = [name for name in theirs if name not in _COMPARED_OTHERWISE and theirs[name] != ours[name]]
    if not same_scaling(found, wanted, wanted.max_position_embeddings):
        differing.append("rope_scaling")
    if differing:
        shown = ", ".join(f"{name} {theirs[name]} (recipe: {ours[name]})" for name in differing)
        raise InputError(
            f"is another model than the recipe's: {shown}.",
            where=source,
            do="Set these fields with --set model.FIELD=...",
        )
