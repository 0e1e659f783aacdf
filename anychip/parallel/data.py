"""Data parallelism: every reader has its own rows. Copies of the model add up their gradients; shards of one copy
(FSDP2, arXiv 2304.11277) gather parameters when a layer needs them and keep their part of gradients and optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from anychip.model.decoder import Decoder
from anychip.parallel.collectives import sum_in_buckets
from anychip.parallel.host_memory import share_host_memory
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local


def apply_sharding(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, *, pipelined: bool) -> None:
    """Shard each layer and what is around the layers over `mesh` (shard, or replicate x shard).

    Parameters travel in the compute dtype, gradients are added up in fp32 or wider. The loss is already divided by the
    labels of the whole batch, so SUM is all a collective library must know. A pipeline stage keeps its parameters
    gathered for all micro-batches of a step.
    """
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not pipelined)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        share_host_memory(sharded, mesh.get_group(mesh.ndim - 1))


def sum_copies(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Add up gradients of an unsharded model over everything that read different tokens. Once a step."""
    group = processes.group("replicate", "context")
    if group is not None and processes.layout.shard == 1:
        sum_in_buckets((local(p.grad) for p in parameters if p.grad is not None), group)
