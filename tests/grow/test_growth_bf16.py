"""No jump: a run in bf16 that grows, beside the same run that does not, over the same batches.

The statement. s is the noise of a step: the standard deviation of the changes of the loss from step to step in the 20
steps before growth, over the square root of two. In each of the 10 steps after it the grown run's loss is less than 3 s
above the other's, which a jump of 3 s or more in any of them would break; right after growth, before the grown model
has learned anything, it is less than a tenth of s away.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import write_tiny_recipe

from anychip.recipe import load_recipe
from anychip.rundir import RunDirectory
from anychip.stages import run_stage

AT, BEFORE, AFTER = 40, 20, 10
WIDER = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 160,
         "num_hidden_layers": 3}  # fmt: skip
GROWTHS: dict[str, dict[str, Any]] = {
    "immediate": {},
    "masked": {"mode": "masked", "open_steps": 5},
}


def losses(folder: Path, name: str, grow: list[dict[str, Any]]) -> list[float]:
    """Of each step of a run that is trained here, in bf16."""
    path = write_tiny_recipe(folder, name, steps=AT + AFTER, compute_dtype="bf16", eval_interval=0, micro_batch_size=8,
                             global_batch_size=8, seq_length=64)  # fmt: skip
    raw = yaml.safe_load(path.read_text())
    raw["checkpoint"] = {"save_interval": 1000}
    raw["optimizer"] = {"lr": 3e-3, "schedule": {"kind": "constant", "warmup_steps": 5}}
    path.write_text(yaml.safe_dump(raw | {"grow": grow}))
    recipe, run = load_recipe(path, []), RunDirectory(folder / "runs" / name)
    if not (folder / "runs").exists():
        run_stage("data", recipe, run)
        shutil.copytree(folder / "runs", folder / "prepared")
    elif not run.root.exists():
        shutil.copytree(next((folder / "prepared").iterdir()), run.root)
    run_stage("train", recipe, run)
    rows = map(json.loads, (run.root / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("bf16")
    return folder, losses(folder, "calm", [])


@pytest.mark.parametrize("kind", GROWTHS)
def test_the_loss_does_not_jump(calm: tuple[Path, list[float]], kind: str) -> None:
    folder, other = calm
    grown = losses(folder, kind, [{"at_tokens": AT * 8 * 64, "to": WIDER, **GROWTHS[kind]}])
    assert grown[:AT] == other[:AT] and len(grown) == len(other) == AT + AFTER
    changes = [b - a for a, b in zip(other[AT - BEFORE - 1 : AT - 1], other[AT - BEFORE : AT], strict=True)]
    noise = statistics.stdev(changes) / 2**0.5
    rises = [(mine - its) / noise for mine, its in zip(grown[AT:], other[AT:], strict=True)]
    assert abs(rises[0]) < 0.1
    assert max(rises) < 3, rises
