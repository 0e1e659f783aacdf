"""Small recipes and texts for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anychip.recipe import Recipe
from anychip.recipe.load import parse_recipe

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu")


def sentence(seed: int, words: int = 40) -> str:
    """Text that differs from seed to seed in its order of words."""
    state = seed * 2654435761 + 1
    chosen = []
    for _ in range(words):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        chosen.append(f"{WORDS[(state >> 33) % len(WORDS)]}{(state >> 40) % 97}")
    return "\n".join(" ".join(chosen[start : start + 12]) for start in range(0, words, 12)) + "."


def make_recipe(sources: list[dict[str, Any]], **sections: Any) -> Recipe:
    """A recipe for tiny data: `data` and `training` may be given as dictionaries of fields."""
    data = {
        "sources": sources,
        "workers": 1,
        "validation_fraction": 0.1,
        "executor": {"tasks": 1},
        "tokenizer": {"vocab_size": 300},
        **sections.pop("data", {}),
    }
    training = {"steps": 50, "seq_length": 16, "micro_batch_size": 1, "global_batch_size": 4}
    training |= sections.pop("training", {})
    model = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **sections.pop("model", {}),
    }
    return parse_recipe({"name": "test", "model": model, "data": data, "training": training, **sections}, "test")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
