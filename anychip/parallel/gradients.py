"""The gradient's norm over all processes, the same number on each, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local

COPY_AXES = ("replicate", "shard", "context", "tensor")
_ROW = 4096  # numbers whose squares a CPU adds up in fp32, one after the other
# What expert parallelism makes of the shard axis. An expert's parameters are cut along all of it.
_SHARD_PARTS = {"outer": "shard", "across": "shard", "within": "shard"}


def gradient_norm(parameters: Iterable[nn.Parameter], processes: Processes) -> Tensor:
    """The norm of all gradients, a scalar. Every element counts once: of several copies the one of the lowest rank."""
    parameters = list(parameters)
    wide = torch.float64 if processes.device.type == "cpu" else torch.promote_types(parameters[0].dtype, torch.float32)
    counted = [local(p.grad) for p in parameters if p.grad is not None and _counts_here(p, processes)]
    return processes.sum(_sum_of_squares(counted, wide, processes.device)).sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale gradients of this norm down to the norm `largest` (0: leave them)."""
    if largest and norm > largest:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))


def _sum_of_squares(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=dtype, device=device)
    on_cpu = device.type == "cpu"
    norms = torch.cat(list(map(_norms_of_rows, tensors))) if on_cpu else torch.stack(torch._foreach_norm(tensors))
    return norms.to(dtype).square().sum()


def _norms_of_rows(tensor: Tensor) -> Tensor:
    """The norms of short rows of a tensor. PyTorch's own norm on a CPU adds squares one by one in fp32, which loses
    3 in 1,000 of thirty million, and how much depends on how a layout cuts a matrix."""
    flat = tensor.flatten()
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return torch.cat((rows, torch.linalg.vector_norm(flat[whole:])[None]))


def _counts_here(parameter: nn.Parameter, processes: Processes) -> bool:
    shared = sharded_axes(parameter)
    return all(getattr(processes.place, axis) == 0 for axis in COPY_AXES if axis not in shared)


def sharded_axes(parameter: Tensor) -> set[str]:
    """Axes along which processes hold different parts of a tensor."""
    if not isinstance(parameter, DTensor):
        return set()
    names = parameter.device_mesh.mesh_dim_names or ()
    return {
        _SHARD_PARTS.get(axis, axis)
        for name, placement in zip(names, parameter.placements, strict=True)
        if placement != Replicate()
        for axis in name.split("_")
    }
