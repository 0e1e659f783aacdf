"""Adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.

Published models hold keys and values in one matrix, interleaved per head. Two adapters on its halves are one adapter on
the whole of twice the rank: A is one above the other, B has each one's columns in its own rows and zeros elsewhere.
PEFT's `rank_pattern` and `alpha_pattern` say so, and the scale alpha / rank stays the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.errors import InputError
from anychip.families.layouts import published_tensors
from anychip.families.published import PublishedTensor
from anychip.files import fsync_directory, write_json
from anychip.interchange.layout import to_published
from anychip.interchange.safetensors_file import write_safetensors
from anychip.recipe.schema import LoraConfig, ModelConfig, Recipe
from anychip.rundir import RunDirectory
from anychip.tune.adapters import adapted_tensors, newest_adapter

Halves = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]


def export_adapter(run: RunDirectory, stage: str | None = None, out: Path | None = None) -> Path:
    """Write the newest adapter of a stage (default: the last tuned one) to `out` (default: RUN/adapter); fp32.

    Raises InputError when there is none, or when something else is in the target's place.
    """
    recipe = run.read_recipe()
    tuned = {"grpo": (run.grpo, recipe.tune.grpo), "dpo": (run.dpo, recipe.tune.dpo), "sft": (run.sft, recipe.tune.sft)}
    names = [stage] if stage else [name for name, (_, config) in tuned.items() if config is not None and config.lora]
    if not names or names[0] not in tuned:
        raise InputError(
            "has no adapter: it was not tuned with lora.", where=run.root, do="Add tune.sft.lora and tune."
        )
    folder, config = tuned[names[0]]
    if config is None or config.lora is None:
        raise InputError(f"was not tuned with tune.{names[0]}.lora.", where=run.root, do="Choose another --stage.")
    store, newest = newest_adapter(folder)
    adapted, lora = adapted_tensors(recipe, config.lora), config.lora

    def read(name: str) -> Halves | None:
        if name not in adapted:
            return None
        halves = dict(store.read(newest, [f"model.{half}" for half in adapted[name]]))
        a, b = (halves[f"model.{half}"] for half in adapted[name])
        return a.float(), b.float()

    target = out or run.root / "adapter"
    if target.exists() and not {path.name for path in target.iterdir()} <= {"adapter_config.json", _WEIGHTS}:
        raise InputError("exists and is not an adapter; it is left as it is.", where=target, do="Choose another --out.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        made = Path(temporary) / "adapter"
        made.mkdir()
        published = [t for t in published_tensors(recipe.final_model) if any(name in adapted for name in t.logical)]
        _write_weights(made, recipe.final_model, published, read)
        write_json(made / "adapter_config.json", _config(recipe, lora, published, adapted))
        fsync_directory(made)
        if target.exists():
            target.rename(Path(temporary) / "older")
        made.rename(target)
    return target


_WEIGHTS = "adapter_model.safetensors"


def _write_weights(
    folder: Path, config: ModelConfig, published: list[PublishedTensor], read: Callable[[str], Halves | None]
) -> None:
    tensors: dict[str, Tensor] = {}
    for tensor in published:
        a, b = fused(config, tensor, [read(name) for name in tensor.logical])
        module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]

    def data() -> Iterator[Tensor]:
        yield from tensors.values()

    write_safetensors(folder / _WEIGHTS, shapes, torch.float32, data())


def fused(config: ModelConfig, tensor: PublishedTensor, parts: list[Halves | None]) -> Halves:
    """One adapter of a published matrix from those of the matrices it is made of."""
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    rows = config.num_key_value_heads * config.head_dim
    columns = []
    for index, part in enumerate(parts):
        if part is not None:
            zeros = torch.zeros(rows, part[1].shape[1])
            columns.append(
                to_published_rows(config, tensor, [part[1] if i == index else zeros for i in range(len(parts))])
            )
    return torch.cat([a for a, _ in given]), torch.cat(columns, dim=1)


def to_published_rows(config: ModelConfig, tensor: PublishedTensor, parts: list[Tensor]) -> Tensor:
    """`to_published` for matrices of any number of columns."""
    narrow = PublishedTensor(tensor.name, (tensor.shape[0], parts[0].shape[1]), tensor.logical)
    return to_published(config, narrow, parts)


def _config(
    recipe: Recipe, lora: LoraConfig, published: list[PublishedTensor], adapted: dict[str, Any]
) -> dict[str, Any]:
    modules = {t.name.split(".")[-2]: sum(name in adapted for name in t.logical) for t in published}
    doubled = {module: count for module, count in modules.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.final_model.preset or recipe.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(modules),
        "rank_pattern": {module: lora.rank * count for module, count in doubled.items()},
        "alpha_pattern": {module: lora.alpha * count for module, count in doubled.items()},
    }
