"""Tensor parallelism with the sequence split between the matrices (arXiv 1909.08053, 2205.05198).

Each process holds a part of every matrix: columns of q, k, v, gate, up and rows of the vocabulary; rows of o and down.
Between them, where every token stands alone (norms, residual), each process holds a part of the sequence. So a layer
gathers the sequence twice and sums partial products back into parts twice; nothing else travels.

Parameters become DTensors, which keeps their global names and shapes; products run on their local parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import _disable_current_modes

from anychip.model.decoder import Attention, Decoder, further_modules
from anychip.model.layers import MLP, Adapter, Linear, RMSNorm
from anychip.model.remake import Remake, product
from anychip.parallel.collectives import GatherSequence, ScatterSequence, sum_in_buckets
from anychip.parallel.messages import telling

_ATTENTION_COLUMNS = ("q_proj", "k_proj", "v_proj")
MLP_PARTS = ("gate_proj", "up_proj"), "down_proj"


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, differentiable; the tensor itself when it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(like: Tensor, whole_tensor: Tensor) -> Tensor:
    """The part of a whole tensor that lies where `like`'s part of its own does."""
    return whole_tensor[box_of(like)] if isinstance(like, DTensor) else whole_tensor


def box_of(like: Tensor) -> tuple[slice, ...]:
    """Where this process's part lies in the whole tensor."""
    if not isinstance(like, DTensor):
        return tuple(slice(0, n) for n in like.shape)
    with _disable_current_modes():  # places are real numbers even where tensors are fake, as in a dry run
        sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Every process's `part`, put together as `like` is; called by all that share it."""
    if not isinstance(like, DTensor):
        return part
    axes = ", ".join(like.device_mesh.mesh_dim_names or ())
    with telling("all_gather", axes, part.nbytes):
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut the parameters of a decoder (or of one pipeline stage of it) and make its modules compute on their parts.

    Outputs of embedding, layers and final norm are then [b, s / n, h]: this process's part of the sequence. Latent
    attention, experts and modules for further tokens are left to tensor_experts.py.
    """
    layer: Any
    for layer in (*model.layers, *(module.layer for module in further_modules(model))):
        for block, columns, rows in ((layer.self_attn, _ATTENTION_COLUMNS, "o_proj"), (layer.mlp, *MLP_PARTS)):
            if isinstance(block, Attention | MLP):
                split_block(block, mesh, columns, rows)
                block.forward = with_whole_sequence(block.forward, mesh)  # type: ignore[method-assign]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            keep_whole(norm, mesh)
    if model.embed_tokens is not None:
        _shard(model.embed_tokens, mesh, 0)
        model.embed_tokens.forward = partial(_embed, model.embed_tokens, mesh)  # type: ignore[method-assign]
    if model.norm is not None:
        keep_whole(model.norm, mesh)
    if getattr(model, "lm_head", None) is not None:
        split_columns(model.lm_head, mesh)


def split_block(block: nn.Module, mesh: DeviceMesh, columns: Iterable[str], rows: str) -> None:
    """Cut the products of a block by columns, and the one that follows them by rows."""
    for name in columns:
        split_columns(block.get_submodule(name), mesh)
    linear: Any = block.get_submodule(rows)
    split_rows(linear, mesh)
    linear.forward = partial(_row, linear, mesh)


def split_columns(linear: Any, mesh: DeviceMesh) -> None:
    _shard(linear, mesh, 0)
    _shard_adapter(linear.adapter, mesh, a=Replicate(), b=Shard(0))
    linear.forward = partial(product_here, linear)


def split_rows(linear: Any, mesh: DeviceMesh) -> None:
    _shard(linear, mesh, 1)
    _shard_adapter(linear.adapter, mesh, a=Shard(1), b=Replicate())


def keep_linear_whole(linear: Any, mesh: DeviceMesh) -> None:
    """Of a product that every process makes of its part of the sequence."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        linear.register_parameter(name, as_dtensor(parameter, mesh, Replicate()))
    _shard_adapter(linear.adapter, mesh, a=Replicate(), b=Replicate())
    linear.forward = partial(product_here, linear)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Add up, over the group, gradients of what every process holds whole: of norms and biases each saw only its part
    of the sequence, of an adapter only its part of the matrix. Once a step, before anything reads a gradient."""
    partial_sums = [
        local(p.grad) for p in parameters if p.grad is not None and isinstance(p, DTensor) and _is_whole(p, mesh)
    ]
    sum_in_buckets(partial_sums, mesh.get_group())


def _is_whole(parameter: DTensor, mesh: DeviceMesh) -> bool:
    names = parameter.device_mesh.mesh_dim_names or ()
    assert mesh.mesh_dim_names is not None
    return parameter.placements[names.index(mesh.mesh_dim_names[0])] == Replicate()


def _shard(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Cut `weight` on `dim`. A bias is added to whole rows: cut with the columns, kept whole with the rows."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = Replicate() if name == "bias" and dim == 1 else Shard(dim if name == "weight" else 0)
        module.register_parameter(name, as_dtensor(parameter, mesh, placement))


def _shard_adapter(adapter: Adapter | None, mesh: DeviceMesh, **placements: Any) -> None:
    """Cut an adapter where its matrix is cut; its other half is whole, and every process has a part of its gradient."""
    if adapter is not None:
        for name, placement in placements.items():
            adapter.register_parameter(name, as_dtensor(adapter.get_parameter(name), mesh, placement))
        adapter.forward = partial(_adapt, adapter)  # type: ignore[method-assign]


def _adapt(adapter: Adapter, x: Tensor, remake: Remake | None = None) -> Tensor:
    return adapter.adapt(x, local(adapter.a), local(adapter.b), remake)


def as_dtensor(parameter: nn.Parameter, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
    """The parameter's own part; meant for the meta device, where nothing is copied."""
    part = parameter.detach()
    if isinstance(placement, Shard):
        part = part.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    return nn.Parameter(DTensor.from_local(part, mesh, [placement], run_check=False))


def product_here(linear: Linear, x: Tensor, remake: Remake | None = None) -> Tensor:
    out = product(x, local(linear.weight), None if linear.bias is None else local(linear.bias), remake)
    return out if linear.adapter is None else out + linear.adapter(x, remake)


def _row(linear: Linear, mesh: DeviceMesh, x: Tensor, remake: Remake | None = None) -> Tensor:
    total = ScatterSequence.apply(partial_sum(linear, x, remake), mesh.get_group())
    return total if linear.bias is None else total + local(linear.bias).to(x.dtype)


def partial_sum(linear: Linear, x: Tensor, remake: Remake | None = None) -> Tensor:
    """What this process's inputs bring to the product, without the bias."""
    out = product(x, local(linear.weight), remake=remake)
    return out if linear.adapter is None else out + linear.adapter(x, remake)


def keep_whole(norm: RMSNorm, mesh: DeviceMesh) -> None:
    norm.weight = as_dtensor(norm.weight, mesh, Replicate())
    norm.forward = partial(_norm, norm)  # type: ignore[method-assign]


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return norm.normalize(x, local(norm.weight))


def _embed(embedding: nn.Embedding, mesh: DeviceMesh, input_ids: Tensor) -> Tensor:
    """[b, s] ids -> [b, s / n, h]: every process looks up the ids of its rows, the sum brings them together."""
    weight = local(embedding.weight)
    ids = input_ids - mesh.get_local_rank() * weight.shape[0]
    elsewhere = (ids < 0) | (ids >= weight.shape[0])
    found = F.embedding(ids.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)
    return ScatterSequence.apply(found, mesh.get_group())


def with_whole_sequence(forward: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    def run(x: Tensor, *inputs: Any, remake: Remake | None = None, **keywords: Any) -> Any:
        """The gathered norms are kept: to make them again would take another message."""
        return forward(GatherSequence.apply(x, mesh.get_group()), *inputs, **keywords)

    return run


def gather_sequence(hidden: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Final hidden states of the whole sequence, [b, s / n, h] -> [b, s, h]."""
    return hidden if mesh is None else GatherSequence.apply(hidden, mesh.get_group())
