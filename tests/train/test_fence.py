"""A process whose generation is over publishes nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.directory import CheckpointError
from anychip.train.fence import GENERATION_VARIABLE, LEASE_VARIABLE, Fence, Fenced, fence, open_lease, renew_lease


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run directory's record, at generation 3, of which this process is."""
    path = tmp_path / "coordinator.json"
    path.write_text(json.dumps({"generation": 3}))
    lease = open_lease()
    renew_lease(lease, time.monotonic() + 60)
    monkeypatch.setenv(LEASE_VARIABLE, str(lease))
    monkeypatch.setenv(GENERATION_VARIABLE, f"3:{path}")
    fence.cache_clear()
    yield path
    fence.cache_clear()
    os.close(lease)


def lapse(record: Path) -> None:
    renew_lease(int(os.environ[LEASE_VARIABLE]), time.monotonic() - 0.001)


def newer(record: Path) -> None:
    record.write_text(json.dumps({"generation": 4}))


def torn(record: Path) -> None:
    record.write_text('{"generation": ')


def test_the_newest_generation_under_its_lease_saves(record: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, {"model.a": torch.ones(3)}, {})
    assert store.steps() == [7]


@pytest.mark.parametrize("over", [lapse, newer, torn])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_is_over_publishes_nothing(
    record: Path, tmp_path: Path, over: Callable[[Path], None], asynchronous: bool
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, {"model.a": torch.ones(3)}, {})
    over(record)
    with pytest.raises(CheckpointError, match=r"ran out|the run is at 4|cannot be read"):
        if asynchronous:
            store.save_async(8, {"model.a": torch.ones(3)}, {})
            store.wait()
        else:
            store.save(8, {"model.a": torch.ones(3)}, {})
    assert store.steps() == [7]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000007"]


def test_the_lease_is_seen_by_processes_that_inherit_it(record: Path) -> None:
    fence().check_lease()
    lapse(record)
    pid = os.fork()
    if pid == 0:
        try:
            fence().check_lease()
        except Fenced:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_without_a_supervisor_nothing_is_forbidden() -> None:
    Fence().check()


def test_a_lease_that_was_never_given_is_none() -> None:
    with pytest.raises(Fenced):
        Fence(open_lease(), 1).check_lease()
    with pytest.raises(Fenced):
        Fence(987654, 1).check_lease()
