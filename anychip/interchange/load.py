"""Whatever a user points at, a run directory or a published one, as a model that can be talked to."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anychip.data.tokenizer import Tokenizer, load_tokenizer
from anychip.errors import InputError
from anychip.families.templates import JINJA, TEMPLATES, Template
from anychip.interchange.layout import logical_tensors
from anychip.interchange.published import PublishedDirectory, read_json_object
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig, SamplingConfig
from anychip.rundir import TUNING_STAGES, RunDirectory
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore


@dataclass(frozen=True)
class LoadedModel:
    """`decoder` holds its weights in the dtype they were stored in; `source` says in words what was loaded."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    sampling: SamplingConfig
    source: str
    template: Template = "B"


def load_for_inference(path: Path) -> LoadedModel:
    """Load a run directory (newest tuned checkpoint, else newest pretrained one) or a published model directory.

    Raises InputError when `path` is neither, or when tokenizer and model do not belong together.
    """
    if not path.is_dir():
        raise InputError("is not a directory.", where=path, do="Give a run directory (runs/NAME) or an export.")
    if (path / "recipe.yaml").is_file():
        loaded = _load_run(RunDirectory(path))
    elif (path / "config.json").is_file():
        loaded = _load_published(path)
    else:
        raise InputError(
            "is neither a run directory (recipe.yaml) nor a model directory (config.json).",
            where=path,
            do="Give runs/NAME after training, or an exported or downloaded model.",
        )
    check_tokenizer_fits(loaded.tokenizer, loaded.config, path)
    return loaded


def check_tokenizer_fits(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """Raise InputError when the tokenizer can produce ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"its tokenizer has {tokenizer.vocab_size:,} pieces, its model only {config.vocab_size:,}.",
            where=where,
            do="They belong to different models; use the model's own tokenizer.",
        )


def newest_checkpoint(run: RunDirectory, stage: str | None = None) -> tuple[str, CheckpointStore, CheckpointInfo]:
    """(stage, store, checkpoint) of the newest good checkpoint: tuned if there is one, unless `stage` says which."""
    stages = [*reversed(TUNING_STAGES), "pretrain"]
    if stage is not None and stage not in stages:
        raise InputError(f"--stage {stage} is not known.", do=f"Allowed: {', '.join(stages)}.")
    for name in [stage] if stage else stages:
        store = CheckpointStore(run.stage_checkpoints(name))
        info = store.latest()
        if info is not None:
            return name, store, info
    raise InputError("has no finished checkpoint.", where=run.root, do="Train first: anychip run RECIPE.")


def _load_run(run: RunDirectory) -> LoadedModel:
    recipe = run.read_recipe()
    stage, store, info = newest_checkpoint(run)
    names = [name for name in info.tensors if name.startswith("model.")]
    tensors = ((name.removeprefix("model."), tensor) for name, tensor in store.read(info, names))
    return LoadedModel(
        decoder=_fill(recipe.final_model, tensors, run.root),
        tokenizer=load_tokenizer(run.tokenizer),
        config=recipe.final_model,
        sampling=recipe.serve.sampling,
        source=f"{run.root}, {stage}, step {info.step}",
        template=recipe.tune.template,
    )


def _load_published(path: Path) -> LoadedModel:
    directory = PublishedDirectory(path)
    for warning in directory.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    tensors = logical_tensors(directory.config, directory.tensors(), directory.read)
    return LoadedModel(
        decoder=_fill(directory.config, tensors, path),
        tokenizer=load_tokenizer(path),
        config=directory.config,
        sampling=_sampling(path / "generation_config.json"),
        source=str(path),
        template=_template(path / "tokenizer_config.json"),
    )


def _fill(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], where: Path) -> Decoder:
    """A decoder whose parameters are the given tensors, in their dtype."""
    with torch.device("meta"):
        model = Decoder(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        if expected.get(name) != tensor.shape:
            raise InputError(
                f"holds {name} with shape {list(tensor.shape)}, which its recipe does not describe.",
                where=where,
                do="Restore the recipe.yaml that the run was made with.",
            )
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        del expected[name]
    if expected:
        raise InputError(
            f"lacks {next(iter(expected))}.", where=where, do="Restore the recipe.yaml that the run was made with."
        )
    model.compute_dtype = model.head_weight.dtype
    return model.eval()


def _template(path: Path) -> Template:
    """The one of our chat templates that a published model brings; B, TeleChat2's, where it is another one."""
    text = read_json_object(path).get("chat_template") if path.is_file() else None
    return next((name for name in TEMPLATES if JINJA[name] == text), "B")


def _sampling(path: Path) -> SamplingConfig:
    """Sampling defaults from a generation_config.json; ours where it says nothing usable."""
    if not path.is_file():
        return SamplingConfig()
    raw: dict[str, Any] = read_json_object(path)
    known = {name: raw[name] for name in SamplingConfig.model_fields if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        known = {name: value for name, value in known.items() if name not in ("top_k", "top_p")} | {"temperature": 0.0}
    try:
        return SamplingConfig.model_validate(known)
    except ValueError:
        raise InputError("holds sampling values out of range.", where=path, do="Correct or remove the file.") from None
