"""Training that lost processes, or a host, goes on from memory with the same bits, and without the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_job import counting_batch, counting_job
from emulated_hosts import memory_of, run_hosts
from torch import Tensor

from anychip.data.batch import Batch
from anychip.recipe.schema import (
    CheckpointConfig,
    GuardConfig,
)
from anychip.train.checkpoint import CheckpointStore
from anychip.train.loop import run_training

STEPS = 14


@dataclass(frozen=True)
class Plan:
    """What a start of the run is to do, apart from training to the end."""

    folder: Path
    die_at: int = 0  # after this step, once there is a copy of a step that is not older than `copy_of`
    copy_of: int = 0
    poison: int = 0
    save_interval: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"


class Tokens:
    """Batches of which one may be poisoned; waits for copies, and ends its process where it is told to."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def batch(self, step: int) -> Batch:
        with (self._plan.folder / f"read-{os.environ['RANK']}").open("a") as log:
            log.write(f"{step}\n")
        if self._plan.die_at and step == self._plan.die_at:
            self._wait_for_a_copy()
            os.kill(os.getpid(), signal.SIGKILL)
        return counting_batch(step, poisoned=self._plan.poison == step)

    def documents(self, step: int) -> list[str]:
        return [f"book-{step}"]

    def _wait_for_a_copy(self) -> None:
        while any(thread.name.startswith(("memory-copy", "checkpoint-")) for thread in threading.enumerate()):
            time.sleep(0.01)
        assert newest_in_memory(self._plan.folder) >= self._plan.copy_of


def train(plan: Plan) -> None:
    """In each process."""
    plan.run.mkdir(exist_ok=True)
    job = counting_job(
        plan.run,
        Tokens(plan),
        steps=STEPS,
        micro_batch_size=1,
        checkpoint=CheckpointConfig(save_interval=plan.save_interval, keep=0, memory_interval=1),
        **plan.more,
    )
    run_training(job)


def newest_in_memory(folder: Path) -> int:
    """The newest step of which all hosts together have all parts; 0 for none."""
    held: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for path in folder.glob("memory-of-host-*/anychip-copies-*/step-*/rank-*.json"):
        record = json.loads(path.read_text().split("\n", 1)[1])
        held.setdefault(path.parent.name, set()).add(record["rank"])
        sizes[path.parent.name] = record["world_size"]
    return max((int(name.split("-")[1]) for name, ranks in held.items() if len(ranks) == sizes[name]), default=0)


def killed(layout: list[int], plan: Plan) -> None:
    """Train until every process kills itself."""
    with pytest.raises(AssertionError, match="exit codes"):
        run_hosts(layout, train, plan, plan.folder)
    for path in plan.folder.glob("read-*"):
        path.unlink()


def first_step(folder: Path) -> int:
    """The step that the last start began with, counted from 0."""
    return int((folder / "read-0").read_text().split()[0])


def final(run: Path) -> dict[str, Tensor]:
    store = CheckpointStore(run / "checkpoints")
    newest = store.latest()
    assert newest is not None and newest.step == STEPS
    return {name: tensor.clone() for name, tensor in store.read(newest, newest.tensors)}


def uninterrupted(layout: list[int], plan: Plan) -> dict[str, Tensor]:
    other = replace(plan, folder=plan.folder / "uninterrupted", die_at=0)
    other.folder.mkdir()
    run_hosts(layout, train, other, other.folder)
    return final(other.run)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def lose(folder: Path, *hosts: int) -> None:
    for host in hosts:
        shutil.rmtree(memory_of(folder, host))


def flip(folder: Path, pattern: str) -> None:
    for path in folder.glob(f"memory-of-host-*/anychip-copies-*/step-*/{pattern}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)


@pytest.mark.parametrize("layout", [[1], [1, 1], [2, 2]], ids=str)
def test_what_a_lost_host_held_comes_from_its_neighbour_with_the_same_bits(tmp_path: Path, layout: list[int]) -> None:
    plan = Plan(tmp_path, die_at=9, copy_of=2, save_interval=1 if len(layout) == 1 else 3)
    killed(layout, plan)
    (plan.run / "checkpoints").rename(tmp_path / "out of reach")
    lose(tmp_path, *range(1, len(layout)))
    reached = newest_in_memory(tmp_path)
    run_hosts(layout, train, replace(plan, die_at=0), tmp_path)
    assert first_step(tmp_path) == reached > 0
    assert_equal(final(plan.run), uninterrupted(layout, plan))
    assert not list(tmp_path.glob("memory-of-host-*/*")) and not (plan.run / "memory.json").exists()


def test_damaged_copies_and_lost_hosts_leave_the_disk(tmp_path: Path) -> None:
    plan = Plan(tmp_path, die_at=9, copy_of=2, save_interval=4)
    killed([1, 1], plan)
    flip(tmp_path, "rank-0001.safetensors")
    killed([1, 1], replace(plan, die_at=8))
    on_disk = max(CheckpointStore(plan.run / "checkpoints").steps())
    lose(tmp_path, 0, 1)
    run_hosts([1, 1], train, replace(plan, die_at=0), tmp_path)
    assert first_step(tmp_path) == on_disk
    assert_equal(final(plan.run), uninterrupted([1, 1], plan))


def test_fewer_hosts_go_on(tmp_path: Path) -> None:
    plan = Plan(tmp_path, die_at=9, copy_of=2)
    killed([1, 1], plan)
    lose(tmp_path, 1)
    reached = newest_in_memory(tmp_path)
    run_hosts([1], train, replace(plan, die_at=0), tmp_path)
    assert first_step(tmp_path) == reached
    expected, found = uninterrupted([1, 1], plan), final(plan.run)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_after_going_back_to_the_disk_no_newer_copy_is_ever_used(tmp_path: Path) -> None:
    """The copies are damaged when the run goes back, and whole again later, as a host that was away brings them."""
    plan = Plan(tmp_path, die_at=9, copy_of=6, save_interval=5)
    killed([1], plan)
    assert newest_in_memory(tmp_path) > 5 and CheckpointStore(plan.run / "checkpoints").steps() == [5]
    folder = next(memory_of(tmp_path, 0).iterdir())
    shutil.copytree(folder, tmp_path / "away")
    flip(tmp_path, "rank-*.safetensors")
    killed([1], replace(plan, die_at=6, copy_of=0))
    shutil.rmtree(next(memory_of(tmp_path, 0).iterdir()))
    shutil.copytree(tmp_path / "away", folder)
    run_hosts([1], train, replace(plan, die_at=0), tmp_path)
    assert first_step(tmp_path) == 5


def test_a_rollback_goes_back_to_the_copy_in_memory(tmp_path: Path) -> None:
    guard = {"guard": GuardConfig(explosion=2.0, on_bad_step="rollback")}
    plan = Plan(tmp_path, poison=11, more=guard)
    run_hosts([1, 1], train, plan, tmp_path)
    (event,) = map(json.loads, (plan.run / "logs" / "guard.jsonl").read_text().splitlines())
    assert event["action"] == "rollback" and event["batch"] == 11
    steps = [json.loads(line)["step"] for line in (plan.run / "logs" / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))


def test_a_new_run_of_the_same_name_never_finds_them(tmp_path: Path) -> None:
    plan = Plan(tmp_path, die_at=6, copy_of=2)
    killed([1], plan)
    shutil.rmtree(plan.run)
    run_hosts([1], train, replace(plan, die_at=0), tmp_path)
    assert first_step(tmp_path) == 0
    assert list(memory_of(tmp_path, 0).iterdir()) == []


@pytest.mark.parametrize("name", ["../anychip-copies-precious", "nonsense\u0000"])
def test_a_record_never_leads_elsewhere(tmp_path: Path, name: object) -> None:
    plan = Plan(tmp_path)
    precious = tmp_path / "anychip-copies-precious"
    precious.mkdir()
    (precious / "owner.json").write_text(json.dumps({"run": str(plan.run)}))
    plan.run.mkdir()
    (plan.run / "memory.json").write_text(json.dumps({"folder": name}))
    run_hosts([1], train, plan, tmp_path)
    assert precious.is_dir()
