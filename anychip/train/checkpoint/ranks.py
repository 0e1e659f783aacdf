"""The few words that the ranks of a job exchange about a checkpoint, as JSON: nothing received is ever executed."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The processes that write one checkpoint together; a single process without a group.

    `group` must be a process group whose tensors live in host memory (gloo) and that nothing else uses at the same
    time, since an asynchronous save talks over it from its own thread. Rank 0 of it is the coordinator.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value on the coordinator, in the order of ranks; an empty list elsewhere."""
        if self._group is None:
            return [value]
        mine = _to_bytes(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)] if self.is_coordinator else None
        dist.gather(padded, received, group=self._group, group_dst=0)
        return [_from_bytes(row[: int(n)]) for row, n in zip(received or [], lengths, strict=False)]

    def broadcast(self, value: Any) -> Any:
        """The coordinator's value, everywhere."""
        if self._group is None:
            return value
        payload = _to_bytes(value) if self.is_coordinator else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        dist.broadcast(length, group=self._group, group_src=0)
        if not self.is_coordinator:
            payload = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, group=self._group, group_src=0)
        return _from_bytes(payload)

    def exchange(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of ranks, everywhere."""
        return list(self.broadcast(self.gather(value)))


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(payload: torch.Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())
