"""Growth inside a run: the loss goes on, data and lineage go on, and a run that was stopped anywhere ends the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import finish, write_tiny_recipe

from anychip.stages import open_run, run_stage
from anychip.train import loop
from anychip.train.checkpoint import CheckpointStore

TOKENS_A_STEP = 32 * 4


def growing_recipe(folder: Path, name: str) -> Path:
    path = write_tiny_recipe(folder, name)
    recipe = yaml.safe_load(path.read_text())
    wider = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 128}
    recipe["grow"] = [
        {"at_tokens": 4 * TOKENS_A_STEP, "to": wider},
        {"at_tokens": 8 * TOKENS_A_STEP, "to": {"num_hidden_layers": 4}, "mode": "masked", "open_steps": 3,
         "layers": "distance"},
    ]  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


def newest(root: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(root)
    info = store.latest()
    assert info is not None and info.step == 12
    return dict(store.read(info))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    recipe = growing_recipe(folder, "calm")
    finish(folder, "data", "prepare", str(recipe))
    finish(folder, "train", str(recipe))
    return folder


def test_the_loss_goes_on(grown: Path) -> None:
    rows = [json.loads(line) for line in (grown / "runs/calm/logs/metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "validation_loss" in row]
    for step in (4, 8):
        before, after = [row["validation_loss"] for row in held_out if row["step"] == step]
        assert after == pytest.approx(before, rel=1e-5)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == list(range(1, 13))
    for step in (5, 9):  # no step after growth is worse than the one before by more than the largest ordinary rise
        ordinary = max(losses[n + 1] - losses[n] for n in losses if n + 1 in losses and n + 1 not in (5, 9))
        assert losses[step] - losses[step - 1] <= max(ordinary, 0.05)


def test_lineage_is_kept_in_every_later_checkpoint(grown: Path) -> None:
    info = CheckpointStore(grown / "runs/calm/checkpoints").latest()
    assert info is not None
    assert [entry["step"] for entry in info.extra["lineage"]] == [4, 8]
    record = json.loads((grown / "runs/calm/grow/0/growth.json").read_text())
    assert record["proof"]["passed"] and record["parent"] == info.extra["lineage"][0]["parent"]


@pytest.mark.parametrize("kept", [8, pytest.param(9, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)])
def test_stopped_and_started_again_it_ends_with_the_same_bits(grown: Path, kept: int) -> None:
    """From what is left before step `kept`: at 8 the second growth is to be made again."""
    want = newest(grown / "runs/calm/checkpoints")
    recipe = growing_recipe(grown, "calm")
    run = grown / "runs/calm"
    (run / "stages/train.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) >= kept:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    finish(grown, "train", str(recipe))
    got = newest(run / "checkpoints")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_request_to_stop_in_the_last_step_of_a_model_is_not_forgotten(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = open_run(growing_recipe(grown, "asked"), [], grown / "runs")
    run_stage("data", recipe, run)
    train_step, steps = loop.train_step, list[int]()

    def asked(*values: Any, **more: Any) -> Any:
        steps.append(len(steps) + 1)
        if steps[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*values, **more)

    monkeypatch.setattr(loop, "train_step", asked)
    with pytest.raises(loop.Stopped, match="Stopped at step 4 of 12, which is saved"):
        run_stage("train", recipe, run)
