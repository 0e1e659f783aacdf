"""Expert parallelism (arXiv 2006.16668): the processes of a group share the experts, tokens travel to theirs and back.

A group lies inside `data_parallel_shard`: its members read different rows, so every expert sees the tokens of all of
them. What an expert-parallel group does not split, its shards do: FSDP cuts each expert's matrices among groups. With
tensor parallelism each expert's inner width is cut, too (tensor_experts.py).

Directly, each choice of a token is one row of one all-to-all. Where a group spans nodes (`expert_node_size`), a token
crosses to a node once, however many of its experts are there, its answers come back as one sum, and the inner
all-to-all stays inside the node (arXiv 2201.05596).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from anychip.chips.operators.plain_experts import Gather, rows_of_each
from anychip.model.decoder import Decoder
from anychip.model.experts import Choice, Experts, GroupedLinear, Here, MixtureOfExperts, Sorted, is_fake
from anychip.model.remake import Remake
from anychip.parallel.gradients import sharded_axes
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local


def mixtures(model: Decoder) -> Iterator[MixtureOfExperts]:
    """Every mixture of experts that is here."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def apply_expert_parallel(model: Decoder, processes: Processes) -> None:
    """Keep this process's part of each mixture's experts, on the meta device, and make it exchange tokens."""
    mesh = processes.experts_mesh()
    if mesh is None:
        return
    for mixture in mixtures(model):
        experts = mixture.experts
        for linear, inner in ((experts.gate_proj, 1), (experts.up_proj, 1), (experts.down_proj, 2)):
            for name, parameter in list(linear.named_parameters(recurse=False)):
                share = _share(parameter, processes, mesh, inner if name == "weight" else None)
                linear.register_parameter(name, share)
            linear.held = partial(_held, linear, processes.layout.tensor)  # type: ignore[method-assign]
        if processes.expert_mesh is None:
            continue
        group = processes.expert_node_group or processes.expert_mesh.get_group()
        experts.forward = partial(_run_by_owner, experts, group)  # type: ignore[method-assign]
        if (across := processes.expert_across_group) is not None:
            mixture.routed = partial(_by_node, mixture, across)  # type: ignore[method-assign]


def _share(parameter: nn.Parameter, processes: Processes, mesh: DeviceMesh, inner: int | None) -> nn.Parameter:
    """This process's experts, and of each its part of dimension `inner`; a bias is whole."""
    part, placements = parameter.detach(), []
    for axis, dim in ((processes.expert_mesh, 0), (processes.mesh("tensor"), inner)):
        if axis is not None and dim is not None:
            part = part.chunk(axis.size(), dim)[axis.get_local_rank()]
        if axis is not None:
            placements.append(Replicate() if dim is None else Shard(dim))
    return nn.Parameter(DTensor.from_local(part.contiguous(), mesh, placements, run_check=False))


def _held(linear: GroupedLinear, processes: int) -> tuple[Tensor, Tensor | None]:
    """Of answers that `processes` add up each brings its share of the bias."""
    bias = None if linear.bias is None else local(linear.bias)
    return local(linear.weight), bias if bias is None or processes == 1 else bias / processes


def are_shared(experts: Experts) -> bool:
    """Whether processes that read different rows share them."""
    return any("shard" in sharded_axes(parameter) for parameter in experts.parameters())


def cut_inside(parameter: Tensor) -> Shard:
    """Where FSDP cuts matrices of experts that are shared: inside, where tensor parallelism does not."""
    taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}  # type: ignore[attr-defined]
    return Shard(2 if 1 in taken else 1)


def _run_by_owner(
    experts: Experts,
    group: dist.ProcessGroup,
    x: Tensor,
    sorted_: Sorted,
    remake: Remake | None = None,
    keep: bool = True,
) -> Tensor:
    """As `Experts.forward` over all experts of the group, of which each process runs its own. What was received is
    kept for backward: to gather it again would take another message."""
    rows = Gather.apply(x, sorted_.order, sorted_.place)
    sent, arrived = _exchanged_counts(sorted_.counts, group)  # [processes, experts here] each
    leaving, coming = _totals(sent, len(rows)), _totals(arrived, len(rows))
    received = AllToAll.apply(rows, leaving, coming, group)
    order, place = _by_expert(arrived, len(received))
    answers = Experts.forward(experts, received, Sorted(order, place, arrived.sum(0)), None, keep)
    return AllToAll.apply(Gather.apply(answers, place, order), coming, leaving, group)


def _by_node(
    mixture: MixtureOfExperts,
    group: dist.ProcessGroup,
    x: Tensor,
    choice: Choice,
    remake: Remake | None = None,
    keep: bool = True,
) -> Tensor:
    """As `MixtureOfExperts.routed`; `group` holds one process of each node, of equal place in it."""
    rows, nodes = x.flatten(0, 1), group.size()
    count = mixture.config.n_routed_experts // nodes  # of one node
    token, sent = _leaving(choice.experts // count, nodes)
    sent, arrived = _exchanged_counts(sent, group)
    leaving, coming = _totals(sent, len(token)), _totals(arrived, len(token))
    node = torch.arange(nodes, device=x.device).repeat_interleave(sent.flatten(), output_size=len(token))
    here = choice.experts[token] - (node * count)[:, None]
    here = torch.where((here >= 0) & (here < count), here, count)  # `count`: on another node
    travelled = AllToAll.apply(rows[token], leaving, coming, group)
    weights = AllToAll.apply(choice.weights[token], leaving, coming, group)
    experts = AllToAll.apply(here, leaving, coming, group)
    answered = Here(count, choice.experts.numel())
    sums = MixtureOfExperts.routed(mixture, travelled[None], Choice(weights, experts), None, keep, answered)
    returned = AllToAll.apply(sums, coming, leaving, group)
    return torch.zeros_like(rows).index_add(0, token, returned)


def _leaving(node: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The node of each choice [t, k] -> (the token of each row that leaves, by node; rows for each node). A dry run's
    choices are as likely on one node as on another."""
    wanted = torch.stack([(node == number).any(1) for number in range(nodes)])  # [nodes, t]
    if is_fake(node):
        each = round(len(node) * (1 - (1 - 1 / nodes) ** node.shape[1]))
        return node.new_zeros(nodes * each), wanted.sum(1)
    return wanted.nonzero()[:, 1], wanted.sum(1)


def _exchanged_counts(counts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Rows for each of the group's experts -> (sent, arrived) by process and expert there, [processes, experts]."""
    sent = counts.view(group.size(), -1)
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent.contiguous(), group=group)
    return sent, arrived


def _totals(counts: Tensor, rows: int) -> list[int]:
    """Rows for or from each process."""
    return rows_of_each(counts.sum(1), rows)


def _by_expert(arrived: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows lie by process and within that by expert -> (order that sorts them by expert, its inverse)."""
    processes, experts = arrived.shape
    number = torch.arange(experts, device=arrived.device).repeat(processes)
    order = torch.sort(number.repeat_interleave(arrived.flatten(), output_size=rows), stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(rows, device=order.device)
    return order, place


class AllToAll(torch.autograd.Function):
    """Rows [n, ...], `sent[i]` of which go to process i, -> those that come, `received[i]` from process i."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_outputs[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
