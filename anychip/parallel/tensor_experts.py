"""Tensor parallelism of latent attention, experts and modules for further tokens; see tensor.py.

Latents: each process makes those of its part of the sequence, which then travel instead of the wider hidden states;
what is made of them is cut by heads. Experts: each process has a part of every expert's inner width and sees the tokens
of the whole sequence, so that it routes as the others do; one of them adds the router's losses and loads. Answers are
partial sums, of shared experts too, that are scattered once. Where experts are shared as well (expert.py), processes of
one place in the matrices exchange tokens among themselves. Further tokens: each process joins states and embeddings of
its part of the sequence.

Every process has all of a router, of the products that make latents and of those that join; what reaches their
gradients here is a part of the sum (`tensor.sum_replicated_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from anychip.model.decoder import Decoder, further_modules
from anychip.model.experts import Choice, MixtureOfExperts, Router
from anychip.model.latent_attention import LatentAttention
from anychip.model.layers import MLP, Linear
from anychip.model.remake import Remake
from anychip.parallel.collectives import GatherSequence, ScatterSequence
from anychip.parallel.tensor import (
    MLP_PARTS,
    as_dtensor,
    keep_linear_whole,
    keep_whole,
    local,
    partial_sum,
    split_block,
    split_columns,
    split_rows,
    with_whole_sequence,
)


def apply_tensor_parallel_to_experts(model: Decoder, mesh: DeviceMesh) -> None:
    """What `tensor.apply_tensor_parallel` leaves, on the meta device. Experts' own matrices are cut by expert.py."""
    layer: Any
    for layer in (*model.layers, *(module.layer for module in further_modules(model))):
        if isinstance(layer.self_attn, LatentAttention):
            _split_latent_attention(layer.self_attn, mesh)
        if isinstance(layer.mlp, MixtureOfExperts):
            _split_mixture(layer.mlp, mesh)
    for module in further_modules(model):
        for norm in (module.enorm, module.hnorm, module.norm):
            keep_whole(norm, mesh)
        keep_linear_whole(module.eh_proj, mesh)


def _split_latent_attention(attention: LatentAttention, mesh: DeviceMesh) -> None:
    split_block(attention, mesh, ("kv_b_proj",), "o_proj")
    keep_linear_whole(attention.kv_a_proj_with_mqa, mesh)
    keep_whole(attention.kv_a_layernorm, mesh)
    attention.kv_a_proj_with_mqa.forward = _then_gather(attention.kv_a_proj_with_mqa.forward, mesh)  # type: ignore[method-assign]
    if attention.compressed:
        split_columns(attention.q_b_proj, mesh)
        keep_linear_whole(attention.q_a_proj, mesh)
        keep_whole(attention.q_a_layernorm, mesh)
        attention.q_a_layernorm.forward = _then_gather(attention.q_a_layernorm.forward, mesh)  # type: ignore[method-assign]
    else:
        split_columns(attention.q_proj, mesh)
        attention.q_proj.forward = _of_whole_sequence(attention.q_proj.forward, mesh)  # type: ignore[method-assign]


def _split_mixture(mixture: MixtureOfExperts, mesh: DeviceMesh) -> None:
    router = mixture.gate
    for name, parameter in list(router.named_parameters(recurse=False)):
        router.register_parameter(name, as_dtensor(parameter, mesh, Replicate()))
    router.forward = partial(_choose, router)  # type: ignore[method-assign]
    router.speaks = mesh.get_local_rank() == 0
    if mixture.shared_experts is not None:
        _split_shared_experts(mixture.shared_experts, mesh)
    mixture.forward = with_whole_sequence(_then_scatter(mixture.forward, mesh), mesh)  # type: ignore[method-assign]


def _split_shared_experts(mlp: MLP, mesh: DeviceMesh) -> None:
    columns, rows = MLP_PARTS
    for name in columns:
        split_columns(mlp.get_submodule(name), mesh)
    down: Any = mlp.get_submodule(rows)
    split_rows(down, mesh)
    down.forward = partial(_part_of_row, down, mesh.size())


def _part_of_row(linear: Linear, processes: int, x: Tensor, remake: Remake | None = None) -> Tensor:
    """Each process brings its share of the bias."""
    out = partial_sum(linear, x, remake)
    return out if linear.bias is None else out + (local(linear.bias) / processes).to(x.dtype)


def _choose(router: Router, x: Tensor, remake: Remake | None = None) -> Choice:
    bias = router.e_score_correction_bias
    return router.choose(x, local(router.weight), None if bias is None else local(bias), remake)


def _then_gather(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Any]:
    return lambda *inputs: GatherSequence.apply(forward(*inputs), mesh.get_group())


def _then_scatter(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Any]:
    return lambda *inputs, **keywords: ScatterSequence.apply(forward(*inputs, **keywords), mesh.get_group())


def _of_whole_sequence(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Any]:
    """The gathered input is kept, whatever would make it again: that would take another message."""
    return lambda x, remake=None: forward(GatherSequence.apply(x, mesh.get_group()))
