"""Model merging: the weighted average of models of one shape, tensor by tensor (arXiv 2203.05482)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip import __version__
from anychip.errors import InputError
from anychip.families.published import PublishedTensor
from anychip.families.telechat2 import same_scaling
from anychip.files import fsync_directory, sha256_file, write_json, write_text
from anychip.interchange.export import write_weights
from anychip.interchange.published import PublishedDirectory, read_json_object

RECORD = "merge.json"
_MAX_SHARD_BYTES = 5_000_000_000
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_KEPT = (*_TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def merge_models(paths: Sequence[Path], weights: Sequence[float] | None, out: Path) -> Path:
    """Write the average of exported or published models to `out`, which must not exist yet.

    `weights` (default: equal) are divided by their sum. Sums are in fp64 and rounded once, to the first model's dtype;
    with all weight on one model the result has its bits. Everything but weights is the first model's. `merge.json`
    records the digests of all files read and written, and where each model says it comes from. One tensor is in memory
    at a time. Raises InputError for models that differ in shape or tokenizer, or weights that make no average.
    """
    shares = _shares(paths, weights)
    models = [PublishedDirectory(path) for path in paths]
    for model in models[1:]:
        _check_alike(models[0], model)
    if out.exists():
        raise InputError("exists; it is left as it is.", where=out, do="Choose another --out.")
    dtype = models[0].read(next(iter(models[0].tensors())).name).dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        made = Path(folder) / "merged"
        made.mkdir()
        for name in _KEPT:
            if (paths[0] / name).is_file():
                shutil.copyfile(paths[0] / name, made / name)

        def average(tensor: PublishedTensor) -> Tensor:
            return averaged([model.read(tensor.name) for model in models], shares).to(dtype)

        write_weights(made, models[0].config, models[0].layout, dtype, _MAX_SHARD_BYTES, average)
        record = {
            "anychip": __version__,
            "models": [_lineage(path, share) for path, share in zip(paths, shares, strict=True)],
            "files": {path.name: sha256_file(path) for path in sorted(made.iterdir())},
        }
        write_json(made / RECORD, record)
        write_text(made / "README.md", _card(record))
        fsync_directory(made)
        made.rename(out)
    fsync_directory(out.parent)
    return out


def averaged(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The sum of shares of tensors, in fp64. What has no share is not looked at."""
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        if share:
            part = tensor.double() * share
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _shares(paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(paths) if not weights else list(weights)
    if len(given) != len(paths):
        raise InputError(f"{len(paths)} models have {len(given)} weights.", do="Give one --weight for each, in order.")
    total = sum(given)
    if not torch.tensor(given).isfinite().all() or min(given, default=0.0) < 0 or total <= 0:
        raise InputError("the weights make no average.", do="Give numbers of 0 and more, one of them above 0.")
    return [weight / total for weight in given]


def _check_alike(first: PublishedDirectory, other: PublishedDirectory) -> None:
    one, two = (model.config.model_dump(exclude={"preset", "rope_scaling"}) for model in (first, other))
    differing = [name for name in one if one[name] != two[name]]
    if not same_scaling(first.config, other.config, first.config.max_position_embeddings):
        differing.append("rope_scaling")
    if differing:
        raise InputError(
            f"is another model than {first.path}: {', '.join(differing)} differ.", where=other.path,
            do="Only models of one configuration are merged.",
        )  # fmt: skip
    digests = [
        {name: sha256_file(model.path / name) for name in _TOKENIZERS if (model.path / name).is_file()}
        for model in (first, other)
    ]
    if digests[0] != digests[1]:
        raise InputError(f"has another tokenizer than {first.path}.", where=other.path)


def _lineage(path: Path, share: float) -> dict[str, Any]:
    """A model's files, and what it says of where it comes from: an export's source, or a merge's own models."""
    record: dict[str, Any] = {
        "path": path.resolve().name,
        "share": share,
        "files": {file.name: sha256_file(file) for file in sorted(path.iterdir()) if file.is_file()},
    }
    for name, key in (("conversion.json", "source"), (RECORD, "models")):
        if (path / name).is_file():
            record[key] = read_json_object(path / name).get(key)
    return record


def _card(record: dict[str, Any]) -> str:
    rows = "\n".join(f"| {model['path']} | {model['share']:.6g} |" for model in record["models"])
    return (
        "# Merged model\n\nThe weighted average of these models, made by anychip; digests of all files, read and "
        f"written, are in `{RECORD}`.\n\n| model | share |\n|---|---|\n{rows}\n\nWhat an average of weights can do has "
        "to be measured: `anychip eval` runs task files over it.\n"
    )
