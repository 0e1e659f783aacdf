"""Counting what a step would hold and send, from fake tensors that hold and send nothing.

Works below autograd, as a dispatch mode: every operator's new storages are added up while they live, every collective
by its group. Used by the dry run.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining import stage as pipelining
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from anychip.parallel.tensor import local

# Share of a message that one process sends, for n processes: ring algorithms, bandwidth-optimal.
_SENT = {
    "alltoall": lambda n: (n - 1) / n,
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


_WHERE_GRADIENTS_CHANGE = (
    "init_unsharded_param",
    "accumulate_unsharded_grad_if_needed",
    "to_accumulated_grad_if_needed",
)
Term = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers"]
TERMS: tuple[Term, ...] = get_args(Term)


@dataclass
class Traffic:
    """What one process sends over one group with one kind of operation."""

    calls: int = 0
    bytes: float = 0.0


@dataclass
class _Storage:
    size: int
    term: Term
    born: int  # the number of changes before it


class Accounting(TorchDispatchMode):
    """Bytes of live storages by term, now and when they were most, and bytes sent, by (name of group, operation).

    A storage is of the term in whose block (`term`) it was made, or of the one that it turned out to be of (`assign`),
    in hindsight too.
    """

    def __init__(self, group_names: Mapping[str, str]) -> None:
        super().__init__()
        self._group_names = group_names
        self._storages: dict[int, _Storage] = {}
        self._masters: set[int] = set()
        self._elsewhere: set[int] = set()
        self._term: Term = "activations"
        self._paused = False
        self._changes = self._peaked = 0
        self.live: dict[Term, int] = dict.fromkeys(TERMS, 0)
        self.peak = dict(self.live)
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self.operators = 0

    @property
    def live_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again for the part that lies here
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        self.operators += 1
        if func.namespace == "c10d":
            self._count_message(func._schema.name.split("::")[1], args)
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._masters
        for value in tree_iter(result):
            if isinstance(value, FakeTensor):
                self._count_storage(value.untyped_storage(), "weights" if cast else self._term)
        return result

    @contextmanager
    def term(self, term: Term) -> Iterator[None]:
        """What is made in this block is of this term."""
        before, self._term = self._term, term
        try:
            yield
        finally:
            self._term = before

    def assign(self, tensor: Tensor | None, term: Term) -> None:
        """The storage of this tensor is of this term, and was when memory was fullest."""
        if tensor is not None and (found := self._storages.get(tensor.untyped_storage()._cdata)) is not None:
            self._assign(found, term)

    def keep_masters(self, parameters: Iterable[Tensor]) -> None:
        """Copies of these in another type are weights."""
        self._masters = {parameter.untyped_storage()._cdata for parameter in parameters}

    def leave_out(self, *tensors: Tensor) -> None:
        """What lies in another memory than the rank's device."""
        self._elsewhere |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def reset_peak(self) -> None:
        self.peak, self._peaked = dict(self.live), self._changes

    def _assign(self, storage: _Storage, term: Term) -> None:
        for bytes_by_term in (self.live, self.peak) if storage.born < self._peaked else (self.live,):
            bytes_by_term[storage.term] -= storage.size
            bytes_by_term[term] += storage.size
        storage.term = term

    def _count_storage(self, storage: torch.UntypedStorage, term: Term) -> None:
        key = storage._cdata
        if key in self._elsewhere:
            return
        if key not in self._storages:
            weakref.finalize(storage, self._forget, key)
            self._storages[key] = _Storage(0, term, self._changes)
        self._resize(self._storages[key], storage.nbytes())

    def _resize(self, storage: _Storage, size: int) -> None:
        self.live[storage.term] += size - storage.size
        storage.size = size
        self._changes += 1
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key)
        self.live[gone.term] -= gone.size

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
        """Also count what no operator shows: FSDP frees gathered parameters by shrinking their storage. Tell what is a
        gathered parameter, a gradient or a message: a pipeline has room for all that a step receives. And leave out
        what only looks like memory: DTensor infers shapes on whole tensors."""
        resize, infer = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            found = self._storages.get(storage._cdata)
            if found is not None:
                self._assign(found, "weights")
            result = resize(storage, size)
            if found is not None:
                self._resize(found, size)
            return result

        def uncounted(*args: Any) -> Any:
            self._paused = True
            try:
                return infer(*args)
            finally:
                self._paused = False

        with ExitStack() as changes:
            changes.enter_context(_replaced(torch.UntypedStorage, "resize_", counted))
            changes.enter_context(_replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", uncounted))
            for name in ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce"):
                messages = self._within("buffers", getattr(_fsdp_param_group, name))
                changes.enter_context(_replaced(_fsdp_param_group, name, messages))
            received = self._within("buffers", getattr(pipelining, "_make_tensor_from_meta"))  # noqa: B009
            changes.enter_context(_replaced(pipelining, "_make_tensor_from_meta", received))
            for name in _WHERE_GRADIENTS_CHANGE:
                told = self._telling_gradients(getattr(FSDPParam, name))
                changes.enter_context(_replaced(FSDPParam, name, told))
            yield

    def _within(self, term: Term, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.term(term):
                return function(*args, **kwargs)

        return run

    def _telling_gradients(self, function: Callable[[FSDPParam], None]) -> Callable[[FSDPParam], None]:
        """Before and after: whole gradients of a sharded parameter, summed up or just made."""

        def run(parameter: FSDPParam) -> None:
            known = getattr(parameter, "_unsharded_param", None)
            if known is not None:
                self.watch_gradient(known)
            function(parameter)
            if known is None and (whole := getattr(parameter, "_unsharded_param", None)) is not None:
                whole.register_post_accumulate_grad_hook(self.watch_gradient)
            if parameter.unsharded_accumulated_grad is not None:
                self.assign(local(parameter.unsharded_accumulated_grad), "gradients")

        return run

    def watch_gradient(self, parameter: Tensor) -> None:
        """A hook for parameters: their gradients are gradients."""
        if parameter.grad is not None:
            self.assign(local(parameter.grad), "gradients")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _process_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except (RuntimeError, TypeError):
            return None
    return None
