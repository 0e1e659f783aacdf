"""Data parallelism: every reader has its own rows. Copies of the model add up their gradients; shards of one copy
(FSDP2, arXiv 2304.11277) gather parameters when a layer needs them and keep their part of gradients and optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from anychip.model.decoder import Decoder, further_modules
from anychip.parallel.collectives import sum_in_buckets
from anychip.parallel.expert import are_shared, cut_inside, mixtures
from anychip.parallel.gradients import sharded_axes
from anychip.parallel.host_memory import share_host_memory
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local

READING_AXES = ("replicate", "shard", "context")  # along which processes read different tokens


def apply_sharding(
    model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, *, pipelined: bool, experts: DeviceMesh | None = None
) -> None:
    """Shard each layer and what is around the layers over `mesh` (shard, or replicate x shard).

    Of experts that processes share, each process's part is sharded over `experts`, each matrix cut inside, or is left
    as it is; routers stay whole, in fp32.

    Parameters travel in the compute dtype, gradients are added up in fp32 or wider. The loss is already divided by the
    labels of the whole batch, so SUM is all a collective library must know. A pipeline stage keeps its parameters
    gathered for all micro-batches of a step.
    """
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    whole = {parameter for mixture in mixtures(model) for parameter in mixture.gate.parameters()}
    for mixture in mixtures(model):
        if experts is not None:
            fully_shard(
                mixture.experts,
                mesh=experts,
                mp_policy=policy,
                reshard_after_forward=not pipelined,
                shard_placement_fn=cut_inside,
            )
        elif are_shared(mixture.experts):
            whole |= set(mixture.experts.parameters())
    for layer in (*model.layers, *further_modules(model)):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not pipelined, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        of_experts = {mixture.experts for mixture in mixtures(model)}
        share_host_memory([module for module in sharded if module not in of_experts], mesh)
        share_host_memory([module for module in sharded if module in of_experts], experts)


def sum_copies(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Add up gradients that FSDP does not over everything that read different tokens. Once a step."""
    by_axes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None and not is_sharded_by_fsdp(parameter):
            axes = tuple(axis for axis in READING_AXES if axis not in sharded_axes(parameter))
            by_axes[axes].append(local(parameter.grad))
    for axes, gradients in by_axes.items():
        if (group := processes.group(*axes)) is not None:
            sum_in_buckets(gradients, group)


def is_sharded_by_fsdp(parameter: Tensor) -> bool:
    """Whether its mesh has a dimension that processes are sharded over, beside those that split matrices or experts."""
    if not isinstance(parameter, DTensor):
        return False
    names = {axis for name in parameter.device_mesh.mesh_dim_names or () for axis in name.split("_")}
    return bool(names & {"shard", "outer", "context"})
