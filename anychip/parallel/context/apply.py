"""Context parallelism for a plain decoder: each process holds a part of every sequence (see `split`)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh

from anychip.chips.operators import Operators, reference
from anychip.model.decoder import Decoder
from anychip.parallel.collectives import gather
from anychip.parallel.context.attention import GatheredAttention, RingAttention
from anychip.parallel.context.blocks import (
    Plan,
    gathered_plan,
    gathered_plan_inside,
    ring_plan,
    ring_plan_inside,
)

Method = Literal["ring", "all_gather"]


class ContextAttention:
    """In the place of a layer's `attend`: the same attention for a process that holds a part of the sequence."""

    def __init__(self, group: dist.ProcessGroup, method: Method, operators: Operators) -> None:
        self._group, self._operators = group, operators
        self._attention = RingAttention if method == "ring" else GatheredAttention
        self._plan = ring_plan if method == "ring" else gathered_plan

    @_disable_dynamo  # as torch.compiler.disable, which imports the compiler at once
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Plan | None) -> Tensor:
        """q [b, n, s, d], k and v [b, kv, s, d] of this process's tokens -> [b, n, s, d]. `mask`: what
        `plan_inside` returned, or None."""
        assert causal and q.shape[2] == k.shape[2], "only whole causal sequences are split"
        plan = self._plan(q.shape[2], self._group.size(), self._group.rank()) if mask is None else mask
        return self._attention.apply(q, k, v, scale, plan, self._group, self._operators)


def apply_context_parallel(
    model: Decoder, mesh: DeviceMesh | dist.ProcessGroup, method: Method = "ring", operators: Operators = reference
) -> None:
    """Make each layer of a decoder (or of one pipeline stage of it) attend over all processes of `mesh`.

    The decoder is then given `take_part` of input ids and documents, `split_positions` and the whole length.
    """
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    for layer in model.layers:
        layer.self_attn.attend = ContextAttention(group, method, operators)  # type: ignore[union-attr]
    model.visible = partial(plan_inside, group=group, method=method)


def plan_inside(documents: Tensor, group: dist.ProcessGroup, method: Method) -> Plan:
    """What each block of attention may see, from the documents [b, s] int of this process's tokens; called by all.

    Their numbers travel once a forward pass, and go to the host once.
    """
    everyone = gather(documents[None], 0, group)
    return (ring_plan_inside if method == "ring" else gathered_plan_inside)(everyone, group.rank())
