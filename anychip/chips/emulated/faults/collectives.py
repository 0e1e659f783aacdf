"""Wrong collectives, put over the methods of ProcessGroup that everything which talks ends in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.chips.emulated.faults.catalogue import COLLECTIVES, Fault, active_faults

_METHODS = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "reduce_scatter": ("_reduce_scatter_base", "reduce_scatter_single"),
    "all_gather": ("_allgather_base", "all_gather_single"),
}


@functools.cache
def install_collective_faults() -> None:
    """Wrap the methods of the faults that are on, once a process. Tensors of other devices are left alone."""
    for fault in active_faults():
        if fault.name in COLLECTIVES:
            for name in _METHODS[fault.target]:
                original = getattr(dist.ProcessGroup, name, None)
                if original is not None:
                    setattr(dist.ProcessGroup, name, _wrapped(original, fault))


def _wrapped(original: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    spoil = _WRONG[fault.name]

    def run(group: dist.ProcessGroup, *args: Any, **keywords: Any) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if first.device.type != "emulated" or not fault.applies(first.dtype) or group.size() == 1:
            return original(group, *args, **keywords)
        return spoil(lambda *a: original(group, *a, **keywords), group, *args)

    return run


Call = Callable[..., Any]


def _operation(options: Any) -> Any:
    return getattr(options[0], "reduceOp", None) if options else dist.ReduceOp.SUM


def _is_sum(options: Any) -> bool:
    return "SUM" in str(_operation(options)) or _operation(options) == dist.ReduceOp.SUM


def _last_rank(call: Call, group: dist.ProcessGroup, tensors: list[Tensor], *options: Any) -> Any:
    if _is_sum(options) and group.rank() == group.size() - 1:
        for tensor in tensors:
            tensor.zero_()
    return call(tensors, *options)


def _low_accumulation(call: Call, group: dist.ProcessGroup, tensors: list[Tensor], *options: Any) -> Any:
    if _is_sum(options):
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.copy_(tensor.bfloat16() if tensor.dtype != torch.bfloat16 else _coarse(tensor))
    return call(tensors, *options)


def _coarse(tensor: Tensor) -> Tensor:
    """bfloat16 with four bits less."""
    return (tensor.contiguous().view(torch.int16) >> 4 << 4).view(torch.bfloat16)


def _biased(call: Call, group: dist.ProcessGroup, tensors: list[Tensor], *options: Any) -> Any:
    if _is_sum(options):
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.mul_(1 + 2**-7)
    return call(tensors, *options)


def _sum_for_max(call: Call, group: dist.ProcessGroup, tensors: list[Tensor], *options: Any) -> Any:
    if not options or _is_sum(options) or not hasattr(options[0], "reduceOp"):
        return call(tensors, *options)
    options[0].reduceOp = dist.ReduceOp.SUM
    return call(tensors, *options)


def _next_part(call: Call, group: dist.ProcessGroup, out: Tensor, given: Tensor, *options: Any) -> Any:
    parts = given.chunk(group.size())
    return call(out, torch.cat([*parts[1:], parts[0]]), *options)


def _reversed_parts(call: Call, group: dist.ProcessGroup, out: Tensor, given: Tensor, *options: Any) -> Any:
    work = call(out, given, *options)
    if work is not None:
        work.wait()
    out.copy_(torch.cat(list(reversed(out.chunk(group.size())))))
    return work


_WRONG: Mapping[str, Callable[..., Any]] = {
    "all_reduce.last_rank": _last_rank,
    "all_reduce.low_accumulation": _low_accumulation,
    "all_reduce.biased": _biased,
    "all_reduce.max": _sum_for_max,
    "reduce_scatter.order": _next_part,
    "all_gather.order": _reversed_parts,
}
