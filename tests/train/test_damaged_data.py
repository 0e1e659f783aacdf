"""A batch with damaged tokens stops training or is left out, by all processes, written down, and by its own policy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import GLOBAL_BATCH, MODEL, SEED, SEQ_LENGTH, RandomTokens
from rank_pool import run_ranks
from tiny_run import finish, start, write_tiny_recipe

from anychip.data import integrity
from anychip.data.batch import Batch
from anychip.data.cursor import DataCursor
from anychip.data.integrity import DamagedBlock
from anychip.data.loader import TrainingData
from anychip.errors import UnfitError
from anychip.parallel.parts import initialize_parts
from anychip.recipe import load_recipe
from anychip.recipe.schema import CheckpointConfig, GuardConfig, LogConfig, OptimizerConfig, ParallelConfig
from anychip.rundir import RunDirectory
from anychip.stages import run_stage
from anychip.train.checkpoint import CheckpointStore
from anychip.train.job import TrainingJob
from anychip.train.loop import run_training

DAMAGED, STEPS = {2, 3, 7}, 8


class Source(RandomTokens):
    """Damaged batches are seen by the second process alone, as when only its host has lost the pages."""

    def batch(self, step: int) -> Batch:
        if step in DAMAGED and os.environ["RANK"] == "1":
            raise DamagedBlock("has wrong bytes between 0 and 131,072.", where="corpus.bin")
        return super().batch(step)

    def documents(self, step: int) -> list[str]:
        return [f"book-{step}"]


class Without(Source):
    """The same corpus, had it never held the damaged batches."""

    def batch(self, step: int) -> Batch:
        return super().batch([n for n in range(100) if n not in DAMAGED][step])


def job(directory: Path, source: Source, **guard: Any) -> TrainingJob:
    return TrainingJob(
        title="damaged",
        directory=directory,
        model=MODEL,
        source=source,
        initialize=lambda parameters: initialize_parts(parameters, MODEL, SEED),
        evaluate=None,
        identity="damaged",
        steps=STEPS,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=0.003),
        checkpoint=CheckpointConfig(save_interval=5, keep=0),
        log=LogConfig(interval=1, tensorboard=False),
        compute_dtype="fp32",
        guard=GuardConfig(**guard),
    )


def train_two(folder: Path) -> None:
    run_training(job(folder / "skip", Source(), on_damaged_data="skip", patience=3))
    run_training(job(folder / "without", Without()))
    with pytest.raises(UnfitError, match="wrong bytes" if os.environ["RANK"] == "1" else "2 batches in a row"):
        run_training(job(folder / "patience", Source(), on_damaged_data="skip", patience=2))


def test_two_processes_leave_out_what_one_of_them_saw(tmp_path: Path) -> None:
    run_ranks(2, train_two, tmp_path, tmp_path)
    states = []
    for name in ("skip", "without"):
        store = CheckpointStore(tmp_path / name / "checkpoints")
        states.append({name: tensor.clone() for name, tensor in store.read(store.open(STEPS))})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert DataCursor.of_run(RunDirectory(tmp_path / "skip")).skipped == ((2, 4), (7, 8))
    events = [json.loads(line) for line in (tmp_path / "skip" / "logs" / "guard.jsonl").read_text().splitlines()]
    assert [(event["batch"], event["documents"], event["action"]) for event in events] == [
        (batch, [f"book-{batch}"], "leave_out") for batch in sorted(DAMAGED)
    ]
    assert all("corpus.bin" in event["problem"] for event in events)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared run of small blocks, one of which has a wrong bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1024)
    recipe = write_tiny_recipe(tmp_path)
    run_stage("data", load_recipe(recipe), RunDirectory(tmp_path / "runs" / "tiny"))
    path = tmp_path / "runs" / "tiny" / "data" / "train" / "words.bin"
    data = bytearray(path.read_bytes())
    data[9 * 1024 + 5] ^= 4
    path.write_bytes(data)
    return recipe


def test_a_wrong_bit_on_disk_costs_the_batches_that_hold_its_block(tiny: Path) -> None:
    recipe = load_recipe(tiny, ["guard.on_damaged_data=skip", "training.steps=40", "training.eval_interval=0"])
    run = RunDirectory(tiny.parent / "runs" / "tiny")
    run_stage("train", recipe, run)
    damaged, data = [], TrainingData(run, recipe)
    cursor = DataCursor.of_run(run)
    for position in range(cursor.position(39) + 1):
        try:
            data.batch(position)
        except DamagedBlock:
            damaged.append(position)
    assert damaged and [position for start, stop in cursor.skipped for position in range(start, stop)] == damaged


def test_the_default_stops_and_names_the_file(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    path = tmp_path / "runs" / "tiny" / "data" / "train" / "words.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    process = start(tmp_path, "train", "tiny.yaml")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3 and f"{path.name}: has wrong bytes between 0 and 131,072" in err, err
    path.unlink()
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    assert path.read_bytes() == whole
    finish(tmp_path, "train", "tiny.yaml")
