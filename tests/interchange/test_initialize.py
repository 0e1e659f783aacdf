"""`anychip init`: the weights that training would start from, without training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_recipe

from anychip.errors import InputError
from anychip.interchange.initialize import init_model
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore

RECIPES = Path(__file__).parents[2] / "recipes"


def test_it_is_bit_for_bit_what_training_starts_from(tmp_path: Path) -> None:
    recipe, run = tiny_recipe(seed=11), RunDirectory(tmp_path / "run")
    assert init_model(recipe, run) == run.checkpoints / "step-000000"
    decoder = Decoder(recipe.model)
    init_parameters(decoder, recipe.model, recipe.seed)
    store = CheckpointStore(run.checkpoints)
    tensors = dict(store.read(store.open(0)))
    assert set(tensors) == {f"model.{name}" for name, _ in decoder.named_parameters()}
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in decoder.named_parameters())


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    recipe, run = tiny_recipe(), RunDirectory(tmp_path / "run")
    init_model(recipe, run)
    with pytest.raises(InputError, match=r"step-000000.*not overwritten"):
        init_model(recipe, run)


def test_a_preset_made_small_on_the_command_line(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 500}  # fmt: skip
    overrides = [part for name, value in small.items() for part in ("--set", f"model.{name}={value}")]
    command = [sys.executable, "-m", "anychip", "init", str(RECIPES / "telechat2-7b.yaml"), *overrides]
    first, second = (
        subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-2000:]
    (written,) = tmp_path.glob("runs/*/checkpoints/step-000000")
    assert str(written.relative_to(tmp_path)) in first.stdout
    shapes = {name: entry.shape for name, entry in CheckpointStore(written.parent).open(0).tensors.items()}
    assert len(shapes) == 14 and list(shapes["model.lm_head.weight"]) == [500, 64]
    assert second.returncode == 2 and "not overwritten" in second.stderr and "Traceback" not in second.stderr
