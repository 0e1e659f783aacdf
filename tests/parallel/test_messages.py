"""Whatever this process sends is heard with its number, group and size; and nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from anychip.parallel.messages import Message, heard_by, telling


class Ear:
    """Keeps what it is told: messages in order, and how deep this process is inside of them."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.depth = self.deepest = 0

    def entered(self, message: Message) -> Any:
        self.heard.append(message)
        self.depth += 1
        self.deepest = max(self.depth, self.deepest)
        return message

    def left(self, entry: Any) -> None:
        self.depth -= 1


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_collectives_are_heard_with_group_number_and_size() -> None:
    ear, x = Ear(), torch.ones(4)
    other = dist.new_group(group_desc="mesh_tensor")
    with heard_by(ear, "replicate 1"):
        dist.all_reduce(x)
        dist.barrier(other)
        work = dist.broadcast(x, 0, group=other, async_op=True)
        assert work is not None
        work.wait()
    calls = [message for at, message in enumerate(ear.heard) if message not in ear.heard[:at]]
    assert calls == [
        Message(1, "all_reduce", "all processes (replicate 1)", 16),
        Message(2, "barrier", "tensor", 0),
        Message(3, "broadcast", "tensor", 16),
    ]
    assert ear.depth == 0 and ear.deepest == 1
    assert calls[2].describe() == "broadcast number 3 over tensor, 16 bytes"


@pytest.mark.usefixtures("alone")
def test_wait_for_an_older_message_is_told_as_that() -> None:
    ear, x = Ear(), torch.ones(4)
    with heard_by(ear, "x"):
        first = dist.all_reduce(x, async_op=True)
        second = dist.broadcast(torch.ones(2), 0, async_op=True)
        assert first is not None and second is not None
        first.wait()
        assert ear.heard[-1].number == 1
        second.wait()
        assert ear.heard[-1].number == 2


@pytest.mark.usefixtures("alone")
def test_other_threads_are_not_heard_and_nobody_is_afterwards() -> None:
    ear = Ear()
    before = dist.ProcessGroup.allreduce
    with heard_by(ear, "x"):
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)))
        thread.start()
        thread.join()
        assert ear.heard == []
    assert dist.ProcessGroup.allreduce == before
    dist.all_reduce(torch.ones(1))
    with telling("all_gather", "shard", 8):
        pass
    assert ear.heard == []


def test_what_passes_by_is_told() -> None:
    ear = Ear()
    with heard_by(ear, "x"), telling("all_gather", "shard", 8):
        assert ear.depth == 1
    assert ear.heard == [Message(1, "all_gather", "shard", 8)]
    assert ear.depth == 0


@pytest.mark.usefixtures("alone")
def test_an_error_leaves_the_message() -> None:
    ear = Ear()
    with heard_by(ear, "x"), pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(2).to_sparse())
    assert ear.depth == 0
