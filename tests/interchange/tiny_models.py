"""Runs and published directories of tiny random models, made without training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.families.telechat2 import published_tensors
from anychip.files import write_json
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe import Recipe
from anychip.recipe.load import parse_recipe
from anychip.recipe.schema import ModelConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore

MODEL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@cache
def tiny_tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, 猫坐在垫子上 " * 8, "def f(x):\n    return x + 1\n" * 8], vocab_size=320)


def tiny_recipe(name: str = "tiny", model: Mapping[str, Any] | None = None, **sections: Any) -> Recipe:
    raw = {
        "schema_version": 1,
        "name": name,
        "model": {**MODEL, **(model or {})},
        "data": {"sources": [{"name": "words", "path": "corpus"}]},
        "training": {"seq_length": 32, "steps": 10},
        **sections,
    }
    return parse_recipe(raw, "recipe")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Logical tensors, fp32; no bias is zero and no norm is one, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)
        for name, shape in parameter_shapes(config)
    }


def make_run(
    root: Path,
    recipe: Recipe | None = None,
    weights: Mapping[str, Tensor] | None = None,
    step: int = 5,
    tokenizer: Tokenizer | None = None,
) -> RunDirectory:
    """A run directory with recipe, tokenizer and one checkpoint."""
    run, recipe = RunDirectory(root), recipe or tiny_recipe()
    run.write_recipe(recipe)
    (tokenizer or tiny_tokenizer()).save(run.tokenizer)
    add_checkpoint(run, recipe, step, weights)
    return run


def add_checkpoint(run: RunDirectory, recipe: Recipe, step: int, weights: Mapping[str, Tensor] | None = None) -> None:
    state = {f"model.{name}": tensor for name, tensor in (weights or random_weights(recipe.model)).items()}
    CheckpointStore(run.checkpoints).save(step, state, {})


def published_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random published tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: (
            torch.randn(tensor.shape, generator=generator) * 0.2
            + (1.0 if "norm" in tensor.name or "ln_f" in tensor.name else 0.0)
        ).to(dtype)
        for tensor in published_tensors(config)
    }


PUBLISHED_CONFIG: dict[str, Any] = {
    "architectures": ["TeleChat2ForCausalLM"],
    "model_type": "telechat",
    "vocab_size": 320,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "n_layer": 2,
    "n_head": 4,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-5,
    "base_seqlen": 128,
    "training_seqlen": 128,
    "seq_length": 128,
}


def write_config(folder: Path, **changes: Any) -> None:
    """A published config.json with some fields changed; None removes a field."""
    raw = {**PUBLISHED_CONFIG, **changes}
    write_json(folder / "config.json", {name: value for name, value in raw.items() if value is not None})
