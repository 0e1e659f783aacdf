"""What must hold after a run under faults, read from what it left: as if nothing had happened."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from anychip.errors import AnychipError
from anychip.rundir import RunDirectory
from anychip.supervise.chaos.inside import state_of
from anychip.supervise.record import GENERATIONS_LOG
from anychip.train.checkpoint import CheckpointStore


def differences(calm: RunDirectory, rough: RunDirectory, steps: int) -> list[str]:
    """In which ways the rough run did not end like the calm one, in words."""
    broken = []
    expected, found = _losses(calm), _losses(rough)
    if [step for step, _ in found] != [step for step, _ in expected]:
        broken.append("the log does not hold every step once, in order")
    elif wrong := [step for (step, one), (_, other) in zip(expected, found, strict=True) if one != other]:
        broken.append(f"losses differ from step {wrong[0]} on")
    try:
        states = [_state(run, steps) for run in (calm, rough)]
    except AnychipError as error:
        return [*broken, f"the final checkpoint cannot be read: {error}"]
    (tensors, extra), (other_tensors, other_extra) = states
    if wrong_keys := [key for key in extra.keys() | other_extra.keys() if extra.get(key) != other_extra.get(key)]:
        broken.append(f"the final checkpoints differ in {', '.join(sorted(wrong_keys))}")
    if tensors.keys() != other_tensors.keys():
        return [*broken, "the final checkpoints hold different tensors"]
    wrong_names = [name for name, tensor in tensors.items() if not torch.equal(tensor, other_tensors[name])]
    if wrong_names:
        broken.append(f"{len(wrong_names)} tensors of the final state differ, the first {wrong_names[0]}")
    return broken


def broken_generations(run: RunDirectory, hosts: int, processes: int) -> list[str]:
    """What is wrong with the recorded generations: numbers must rise, and each must have all hosts."""
    rows = _rows(run.logs / GENERATIONS_LOG)
    numbers = [row["generation"] for row in rows]
    broken = []
    if not rows:
        broken.append("no generation was recorded")
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        broken.append(f"the numbers of generations do not rise: {numbers}")
    for row in rows:
        if len(row["hosts"]) != hosts or sum(row["hosts"].values()) != processes:
            broken.append(f"generation {row['generation']} had {row['hosts']}")
    return broken


def _losses(run: RunDirectory) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in _rows(run.logs / "metrics.jsonl") if "loss" in row]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _state(run: RunDirectory, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what else a run goes on from: where the data stands, the guard's memory."""
    store = CheckpointStore(run.checkpoints)
    info = store.open(steps)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}, state_of(info.extra)
