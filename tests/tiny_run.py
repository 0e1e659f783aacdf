"""A run small enough to train in seconds, on text made here."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

WORDS = ["the", "a", "model", "reads", "text", "and", "learns", "what", "comes", "next", "because", "numbers"]


def write_tiny_recipe(folder: Path, name: str = "tiny", **training: object) -> Path:
    """A corpus of seeded sentences and a recipe of a 2-layer model over it; returns the recipe's path."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        chance = random.Random(0)
        for number in range(40):
            lines = [" ".join(chance.choices(WORDS, k=12)) + f" {chance.randrange(10**6)}." for _ in range(40)]
            (corpus / f"{number:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "schema_version": 1,
        "name": name,
        "seed": 7,
        "model": {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        "data": {
            "sources": [{"name": "words", "path": str(corpus)}],
            "validation_fraction": 0.1,
            "dedup": {"enabled": False},
            "executor": {"tasks": 1},
            "workers": 1,
        },
        "training": {
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "steps": 12,
            "compute_dtype": "fp32",
            "eval_interval": 5,
            "eval_tokens": 512,
            **training,
        },
        "optimizer": {"name": "muon", "lr": 0.01, "schedule": {"warmup_steps": 2}},
        "checkpoint": {"save_interval": 3, "keep": 0},
        "log": {"interval": 1, "tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`anychip ARGUMENTS` in `folder`, one thread, output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "anychip", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path, *arguments: str, timeout: float = 240) -> str:
    """Run to the end and return standard output; fails the test with the error text otherwise."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return out


def prepare_and_run(folder: Path, *words: str) -> Path:
    """The tiny recipe and its data in `folder`, as they are then in FOLDER/prepared, and `anychip WORDS` to the end."""
    write_tiny_recipe(folder)
    finish(folder, "data", "prepare", "tiny.yaml")
    shutil.copytree(folder / "runs", folder / "prepared")
    finish(folder, *words)
    return folder
