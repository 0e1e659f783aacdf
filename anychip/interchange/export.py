"""A checkpoint as a published model directory: weights, configuration, tokenizer, template, model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip import __version__
from anychip.data.tokenizer import Tokenizer, load_tokenizer
from anychip.errors import InputError
from anychip.families.layouts import Layout, config_to_json, published_tensors
from anychip.families.published import PublishedTensor
from anychip.families.templates import JINJA, Template
from anychip.files import fsync_directory, sha256_file, write_json, write_text
from anychip.interchange.layout import remembering, to_published
from anychip.interchange.load import check_tokenizer_fits, newest_checkpoint
from anychip.interchange.logit_check import check_logits
from anychip.interchange.model_card import model_card
from anychip.interchange.published import PublishedDirectory, read_json_object
from anychip.interchange.safetensors_file import write_safetensors
from anychip.interchange.source import TensorEntry
from anychip.progress import Progress, progress
from anychip.recipe.schema import ModelConfig, Recipe, SamplingConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore
from anychip.train.checkpoint.manifest import MANIFEST_NAME

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def export_run(
    run: RunDirectory,
    step: int | None = None,
    stage: str | None = None,
    out: Path | None = None,
    layout: Layout | None = None,
) -> Path:
    """Export a checkpoint (default: the newest, tuned before pretrained) to `out` (default: RUN/export), in `layout`
    (default: the recipe's).

    One tensor is in memory at a time. The directory appears only after its logits were compared with the
    checkpoint's; an older export in its place is replaced, anything else is left alone. Raises UnfitError when the
    logits differ, InputError when the target is something else or cannot be written.
    """
    recipe = run.read_recipe()
    if layout is not None:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"layout": layout})})
    stage, store, info = newest_checkpoint(run, stage)
    if step is not None:
        info = store.open(step)
    target = out or run.export
    _check_replaceable(target)
    tokenizer = load_tokenizer(run.tokenizer)
    check_tokenizer_fits(tokenizer, recipe.final_model, run.root)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / "export"
            temporary.mkdir()
            _write_export(temporary, recipe, run, tokenizer, stage, store, info)
            _publish(temporary, target, aside=Path(folder) / "older")
    except OSError as error:
        raise InputError(
            f"could not be written ({error.strerror}).", where=target, do="Free space there or choose another --out."
        ) from None
    return target


def _check_replaceable(target: Path) -> None:
    """Only an export is ever replaced: nothing that somebody else put there, not even beside an export's files."""
    if not target.exists() and not target.is_symlink():
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() and not target.is_symlink() else {"."}
    if not found:
        return
    files = read_json_object(target / "conversion.json").get("files") if "conversion.json" in found else None
    if not isinstance(files, dict) or "config.json" not in files:
        raise InputError("exists and is not an export; it is left as it is.", where=target, do="Choose another --out.")
    foreign = sorted(found - set(files) - {"conversion.json", "README.md"})
    if foreign:
        raise InputError(
            f"holds {foreign[0]}, which no export wrote; it is left as it is.", where=target, do="Choose another --out."
        )


def _publish(temporary: Path, target: Path, aside: Path) -> None:
    """Move the finished export into place; an older one steps aside first and is back if that fails."""
    fsync_directory(temporary)
    if target.exists():
        target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    fsync_directory(target.parent)


def _write_export(
    folder: Path,
    recipe: Recipe,
    run: RunDirectory,
    tokenizer: Tokenizer,
    stage: str,
    store: CheckpointStore,
    info: CheckpointInfo,
) -> None:
    config, dtype = recipe.final_model, _DTYPES[recipe.export.dtype]

    def read(name: str) -> Tensor:
        ((_, tensor),) = store.read(info, [f"model.{name}"])
        return tensor.to(dtype)

    layout, torch_name = recipe.export.layout, str(dtype).removeprefix("torch.")
    remembered = remembering(read)

    def read_published(tensor: PublishedTensor) -> Tensor:
        return to_published(config, tensor, [remembered(name) for name in tensor.logical])

    fields = config_to_json(config, torch_name, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, layout)
    write_weights(folder, config, layout, dtype, recipe.export.max_shard_bytes, read_published)
    write_json(folder / "config.json", fields)
    _write_tokenizer(folder, tokenizer, config, recipe.tune.template)
    write_json(folder / "generation_config.json", _generation_config(recipe.serve.sampling, tokenizer))
    published = PublishedDirectory(folder, known=(config, layout) if layout == "llama" else None)
    check = check_logits(config, read, published.read, folder, layout)
    record = {
        "anychip": __version__,
        "source": {
            "run": recipe.name,
            "stage": stage,
            "step": info.step,
            "manifest": sha256_file(info.path / MANIFEST_NAME),
        },
        "dtype": torch_name,
        "logit_check": check.as_record(),
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / "conversion.json", record)
    write_text(folder / "README.md", model_card(recipe, run, record))


def write_weights(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    max_shard_bytes: int,
    read: Callable[[PublishedTensor], Tensor],
) -> None:
    """The weight files of a published directory, and their index where there are several; one tensor in memory."""
    shards = _shards(config, layout, dtype, max_shard_bytes)
    total = sum(_nbytes(tensor, dtype) for shard in shards for tensor in shard)
    weight_map = {}
    with progress("export", total, "bytes") as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = (data.to(dtype) for data in _watched(shard, read, bar))
            write_safetensors(folder / name, [(t.name, t.shape) for t in shard], dtype, tensors)
            weight_map.update({tensor.name: name for tensor in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _watched(
    shard: list[PublishedTensor], read: Callable[[PublishedTensor], Tensor], bar: Progress
) -> Iterator[Tensor]:
    for tensor in shard:
        data = read(tensor)
        yield data.contiguous()
        bar.advance(data.numel() * data.element_size())


def _shards(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, max_shard_bytes: int
) -> list[list[PublishedTensor]]:
    """Tensors in order, cut where a file would become larger than allowed (a larger tensor has a file of its own)."""
    shards: list[list[PublishedTensor]] = [[]]
    size = 0
    for tensor in published_tensors(config, layout):
        nbytes = _nbytes(tensor, dtype)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _nbytes(tensor: PublishedTensor, dtype: torch.dtype) -> int:
    return TensorEntry(dtype, tensor.shape, 0).nbytes


def _generation_config(sampling: SamplingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Hugging Face takes no temperature of 0: greedy decoding is `do_sample` false, without the fields of sampling."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    unused = set() if sampling.temperature else {"temperature", "top_k", "top_p"}
    return {**ids, "do_sample": sampling.temperature > 0, **sampling.model_dump(exclude=unused)}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig, template: Template) -> None:
    """The tokenizer's own files, with the chat template that the model was tuned with."""
    tokenizer.save(folder)
    settings = read_json_object(folder / "tokenizer_config.json")
    settings |= {"chat_template": JINJA[template], "model_max_length": config.max_position_embeddings}
    write_json(folder / "tokenizer_config.json", settings)
    roles = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    control = {"additional_special_tokens": sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)}
    write_json(folder / "special_tokens_map.json", {**roles, **control})
