"""Counting what a step would hold and send, from fake tensors that hold and send nothing.

Works below autograd, as a dispatch mode: every operator's new storages are added up while they live, every collective
by its group. Used by the dry run.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Share of a message that one process sends, for n processes: ring algorithms, bandwidth-optimal.
_SENT = {
    "alltoall": lambda n: (n - 1) / n,
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


@dataclass
class Traffic:
    """What one process sends over one group with one kind of operation."""

    calls: int = 0
    bytes: float = 0.0


class Accounting(TorchDispatchMode):
    """Bytes of live storages (now and at their peak) and bytes sent, by (name of group, operation)."""

    def __init__(self, group_names: Mapping[str, str]) -> None:
        super().__init__()
        self._group_names = group_names
        self._sizes: dict[int, int] = {}
        self._paused = False
        self.live_bytes = self.peak_bytes = 0
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again for the part that lies here
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        self.operators += 1
        if func.namespace == "c10d":
            self._count_message(func._schema.name.split("::")[1], args)
        for value in tree_iter(result):
            if isinstance(value, FakeTensor):
                self._count_storage(value.untyped_storage())
        return result

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self._resize(key, size)

    def _resize(self, key: int, size: int) -> None:
        self.live_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)

    def _count_message(self, operation: str, args: Any) -> None:
        kind = next((kind for kind in _SENT if operation.lstrip("_").startswith(kind)), None)
        group = next((found for value in tree_iter(args) if (found := _process_group(value)) is not None), None)
        if kind is None or group is None:
            return
        sizes = [value.nbytes for value in tree_iter(args) if isinstance(value, Tensor)]
        name = self._group_names.get(group.group_name, "all processes")
        entry = self.traffic[name, kind]
        entry.calls += 1
        entry.bytes += max(sizes) * _SENT[kind](group.size())

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Also count what no operator shows: FSDP frees gathered parameters by shrinking their storage. And leave out
        what only looks like memory: DTensor infers shapes on whole tensors."""
        resize, infer = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, size)
            return result

        def uncounted(*args: Any) -> Any:
            self._paused = True
            try:
                return infer(*args)
            finally:
                self._paused = False

        torch.UntypedStorage.resize_ = counted  # type: ignore[assignment, method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = uncounted  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = infer  # type: ignore[method-assign]


def _process_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except (RuntimeError, TypeError):
            return None
    return None
