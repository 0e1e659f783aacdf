"""Seconds of one step for arrays of layouts: products, attention, pointwise work, collectives, bubble, optimizer.

All times are of one micro-batch on one device until `step_terms` puts them on a pipeline. The closed form is
T = (m - 1) max_i c_i + sum_i c_i for stage times c_i (1F1B), with the schedule's own bubble in place of the sum's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anychip.plan.gemm import linear_seconds, product_seconds
from anychip.plan.network import all_gather, all_reduce, all_to_all, group_of, point_to_point
from anychip.plan.shapes import Work, attention_shapes, parameters
from anychip.plan.table import (
    DUALPIPE_V,
    FULL,
    INTERLEAVED,
    SELECTIVE,
    ZERO_BUBBLE,
    Hardware,
    Table,
    ends_meet,
    micro_batches,
)
from anychip.plan.types import Floats, Site

ATTENTION_HALF_LENGTH = 1024.0  # keys at which fused attention runs at half its speed
ATTENTION_BACKWARD = 2.5  # its scores are made again, and two gradients for each product
WIDE_HEAD = 1.4  # fused kernels are made for heads of up to 128
LAUNCH_NORM = 4.0
LAUNCH_SYNC = 0.06  # host time a doubling of tensor parallelism adds: ranks wait for the slowest of them
LAUNCH_BACKWARD = 1.5  # host time of a backward pass over a forward pass
BACKWARD_POINTWISE = 1.5  # bytes of a backward pass over a forward pass: each result's gradient beside what was read
ACCUMULATE_BYTES = 6.0  # moved to add one weight's gradient to those of earlier micro-batches
CAST_BYTES = 12.0  # of a weight trained here in another type than fp32: made for a micro-batch, and its gradient back
# Of gradients of ends trained here, fp32 for one weight and micro-batch: zeroed, and the head's scaled as well.
EMBEDDING_GRADIENT_BYTES, HEAD_GRADIENT_BYTES, ADDED_GRADIENT_BYTES = 4.0, 12.0, 12.0
ADAM_BYTES = 30.0  # moved an element: fp32 master, two moments read and written, gradient read, parameter written
CLIP_BYTES = 12.0  # zeroing, norm and scaling of a main gradient


@dataclass(frozen=True)
class Pass:
    """One direction of one layer, seconds by kind."""

    matmul: Floats
    attention: Floats
    pointwise: Floats
    tensor: Floats  # exposed tensor-parallel traffic
    context: Floats
    expert: Floats
    overhead: Floats

    @property
    def seconds(self) -> Floats:
        work = self.matmul + self.attention + self.pointwise
        return work + self.tensor + self.context + self.expert + self.overhead


@dataclass(frozen=True)
class LayerCost:
    forward: Pass
    backward: Pass
    weight_seconds: Floats  # the part of the backward pass that only makes weight gradients
    recomputed: Floats  # forward seconds repeated in the backward pass


def layer_cost(w: Work, t: Table, hardware: Hardware, site: Site) -> LayerCost:
    """The mean layer of a model whose layers may be partly dense, partly experts."""
    share = w.moe_layers / w.layers
    tokens = w.seq * t.mbs / t.cp
    products = _products(w, t, tokens, share, hardware, site)
    core_forward, core_backward = _attention_core(w, t, tokens, hardware, site)
    bytes_forward = _pointwise_bytes(w, t, tokens, share, site)
    rate = hardware.bandwidth * site.memory_efficiency * site.pointwise_efficiency
    tensor = _tensor_seconds(w, t, tokens, hardware, site)
    context = _context_seconds(w, t, tokens, core_forward, hardware, site)
    expert = share * _expert_seconds(w, t, tokens, hardware, site)
    forward = Pass(
        matmul=products[0],
        attention=core_forward,
        pointwise=bytes_forward / rate,
        tensor=tensor,
        context=context,
        expert=expert,
        overhead=np.zeros(np.shape(tokens)),
    )
    backward = Pass(
        matmul=products[1] + products[2],
        attention=core_backward,
        pointwise=BACKWARD_POINTWISE * bytes_forward / rate,
        tensor=tensor * (1 + 0.5 * t.sp),  # sequence parallelism gathers its input once more
        context=2 * context,
        expert=expert,
        overhead=np.zeros(np.shape(tokens)),
    )
    launch = site.layer_overhead_s * (1 + LAUNCH_SYNC * np.log2(t.tp))
    forward = replace(forward, overhead=_exposed_launch(forward.seconds, launch))
    backward = replace(backward, overhead=_exposed_launch(backward.seconds, LAUNCH_BACKWARD * launch))
    remade = np.where(
        site.trained_here, _remade_bytes(w, t, tokens, share, site) / rate, core_forward * (1 - site.fused_attention)
    )
    again = np.select([t.recompute == FULL, t.recompute == SELECTIVE], [forward.seconds, remade], 0.0)
    return LayerCost(forward, backward, weight_seconds=products[2], recomputed=again)


def _exposed_launch(device: Floats, launch: Floats) -> Floats:
    """What the host adds when it needs `launch` seconds to start work that the device does in `device` seconds.

    The larger of the two, rounded where they meet, because kernels are not all of one length.
    """
    return np.asarray((device**LAUNCH_NORM + launch**LAUNCH_NORM) ** (1 / LAUNCH_NORM) - device)


def _products(
    w: Work, t: Table, tokens: Floats, share: Floats, hardware: Hardware, site: Site
) -> tuple[Floats, Floats, Floats]:
    """Seconds of all linear layers: forward, input gradient, weight gradient."""
    a = attention_shapes(w)
    up = 1 + w.gated
    local = np.maximum(w.experts, 1) / t.ep
    # Tokens of one expert: it serves its ep ranks, and each tensor-parallel rank brings its own part of them.
    routed = tokens * w.top_k / np.maximum(w.experts, 1) * t.ep * t.expert_tp / t.tp * _busiest(t, site)
    expert_share = share / site.expert_efficiency
    linears: list[tuple[Floats, Floats, Floats, Any, Any]] = [
        (tokens, a.up_q_out / t.tp, a.up_q_in, 1.0, 1.0),
        (tokens, w.hidden, a.out_in / t.tp, 1.0, 1.0),
        (tokens, w.ffn * up / t.tp, w.hidden, 1.0, 1 - share),
        (tokens, w.hidden, w.ffn / t.tp, 1.0, 1 - share),
    ]
    if np.any(w.is_latent):
        linears += [(tokens, a.down_out, w.hidden, 1.0, 1.0), (tokens, a.up_kv_out / t.tp, a.up_kv_in, 1.0, 1.0)]
    if np.any(w.experts):
        linears += [
            (routed, w.moe_ffn * up / t.expert_tp, w.hidden, local, expert_share),
            (routed, w.hidden, w.moe_ffn / t.expert_tp, local, expert_share),
            (tokens, w.shared_ffn * up / t.tp, w.hidden, 1.0, share),
            (tokens, w.hidden, w.shared_ffn / t.tp, 1.0, share),
            (tokens, w.experts, w.hidden, 1.0, share),
        ]
    sums = [np.zeros(np.shape(tokens)) for _ in range(3)]
    for m, n, k, count, weight in linears:
        for total, seconds in zip(sums, linear_seconds(m, n, k, hardware, site, count), strict=True):
            total += weight * seconds
    dense, expert, _, _ = parameters_by_rank(w, t)
    added = np.where(t.zero < 3, (ACCUMULATE_BYTES + _cast_bytes(w, site)) * (dense + expert), 0.0)
    return sums[0], sums[1], sums[2] + added / (hardware.bandwidth * site.memory_efficiency)


def _cast_bytes(w: Work, site: Site) -> Floats:
    return CAST_BYTES * np.asarray(site.trained_here) * (w.element < 4)


def _attention_core(w: Work, t: Table, tokens: Floats, hardware: Hardware, site: Site) -> tuple[Floats, Floats]:
    """Scores, softmax and values of the heads of one rank: seconds forward and backward."""
    heads = w.heads / t.tp
    flops = 2.0 * tokens * w.span * heads * (w.key_dim + w.value_dim)
    skip = np.where((w.causal > 0) & np.asarray(site.causal_skip), 0.5, 1.0)
    long = (1 + ATTENTION_HALF_LENGTH / w.span) * np.where(w.key_dim > 128, WIDE_HEAD, 1.0)
    fused = flops * skip * long / (hardware.half_peak * site.attention_efficiency)
    if np.all(site.fused_attention):
        return fused, ATTENTION_BACKWARD * fused
    batch = heads * t.mbs
    length = w.seq / t.cp
    scores = product_seconds(length, w.seq, w.key_dim, hardware, site, batch)
    values = product_seconds(length, w.value_dim, w.seq, hardware, site, batch)
    square = batch * length * w.seq
    dropout = np.asarray(site.dropout) * 5.0
    rate = hardware.bandwidth * site.memory_efficiency
    softmax_forward, softmax_backward = square * (4.0 + dropout) / rate, square * (6.0 + dropout) / rate
    odd = np.where(np.mod(w.key_dim, 8) > 0, 3.0, 1.0)  # heads of odd width miss the matrix units
    plain_forward = (scores + values) * odd + softmax_forward
    plain_backward = 2 * (scores + values) * odd + softmax_backward
    return (
        np.where(site.fused_attention, fused, plain_forward),
        np.where(site.fused_attention, ATTENTION_BACKWARD * fused, plain_backward),
    )


def _pointwise_bytes(w: Work, t: Table, tokens: Floats, share: Floats, site: Site) -> Floats:
    """Bytes that norms, activations, dropout, residuals and rope of one layer move in the forward pass."""
    shard = np.where(t.sp > 0, t.tp, 1.0)
    dropout = np.asarray(site.dropout) * 1.0
    residual = 2 * (2 + 2 + 2 + dropout) * w.hidden
    width = w.heads * w.key_dim + 2 * w.kv_heads * w.key_dim
    heads = 4 * width  # rope or transposes read and write queries, keys and values
    routed = share * w.top_k * 4 * 2 * w.hidden / shard  # permute and unpermute
    split = heads + _activation_bytes(w, t, share)
    return w.element / 2 * tokens * (((_norm_bytes(w) + residual) / shard + split / t.tp) * _loose(site) + routed)


def _remade_bytes(w: Work, t: Table, tokens: Floats, share: Floats, site: Site) -> Floats:
    """Bytes that our own training moves to make a layer's norms, SwiGLU and experts' rows again (`train.recompute`).
    Processes that share a sequence keep what they gathered of a norm."""
    norms = np.where(t.tp == 1, _norm_bytes(w), 0.0)
    rows = share * w.top_k * 4 * w.hidden / np.where(t.sp > 0, t.tp, 1.0)  # permute
    return w.element / 2 * tokens * ((norms + _activation_bytes(w, t, share) / t.tp) * _loose(site) + rows)


def _norm_bytes(w: Work) -> Floats:
    """Of a token in two norms, with elements of two bytes."""
    return np.asarray(2 * (2 + 2) * w.hidden)


def _activation_bytes(w: Work, t: Table, share: Floats) -> Floats:
    inner = (1 - share) * w.ffn + share * (w.top_k * w.moe_ffn / t.expert_tp + w.shared_ffn)
    return np.asarray(2 * (2 + w.gated) * inner)


def _loose(site: Site) -> Floats:
    """Times as many bytes where each step of a norm or an activation is an operator."""
    return np.where(site.fused_pointwise, 1.0, 1.5)


def _tensor_seconds(w: Work, t: Table, tokens: Floats, hardware: Hardware, site: Site) -> Floats:
    group = group_of(t.tp, np.ones_like(t.tp), hardware, site)
    return 2 * all_reduce(group, tokens * w.hidden * w.element) * (1 - t.overlap_tensor * site.tensor_overlap)


def _context_seconds(w: Work, t: Table, tokens: Floats, core: Floats, hardware: Hardware, site: Site) -> Floats:
    """Forward traffic of context parallelism that attention does not hide."""
    if np.all(t.cp == 1):
        return np.zeros_like(tokens)
    group = group_of(t.cp, t.tp, hardware, site)
    keys = w.kv_heads * (w.key_dim + w.value_dim) / t.tp
    gathered = all_gather(group, tokens * t.cp * keys * w.element)
    queries = w.heads * (w.key_dim + w.value_dim) / t.tp
    swapped = all_to_all(group, tokens * (queries + keys) * w.element, np.ones_like(tokens), hardware, site)
    ring = np.maximum(0.0, gathered - core * (t.cp - 1) / t.cp)
    return np.select([t.method == 0, t.method == 1], [ring, gathered], swapped)


def _expert_seconds(w: Work, t: Table, tokens: Floats, hardware: Hardware, site: Site) -> Floats:
    """Dispatch and combine of one layer with experts."""
    if not np.any(w.experts) or np.all(t.ep * t.expert_tp == 1):
        return np.zeros_like(tokens)
    group = group_of(t.ep, t.expert_tp, hardware, site)
    mine = tokens / np.where(t.sp > 0, t.tp, 1.0)
    sent = mine * w.top_k * w.hidden * w.element
    # Copies that leave the node: one for each expert there, or one for each node that holds any of them.
    nodes = np.maximum(1.0, t.ep / group.members)
    met = nodes * (1 - (1 - 1 / nodes) ** w.top_k)
    copies = np.where(site.routes_by_node, np.minimum(1.0, met / np.maximum(w.top_k, 1)), 1.0)
    return 2 * all_to_all(group, sent * _busiest(t, site), copies, hardware, site)


def _busiest(t: Table, site: Site) -> Floats:
    """Load of the rank that all others of its expert-parallel group wait for, over the mean; one rank alone has all."""
    return np.where(t.ep > 1, site.expert_imbalance, 1.0)


@dataclass(frozen=True)
class EndCost:
    """What the first and the last stage do besides layers, seconds of one micro-batch, both directions."""

    first: Floats
    last: Floats


def end_cost(w: Work, t: Table, hardware: Hardware, site: Site) -> EndCost:
    """Embedding look-up; output head, cross entropy and multi-token prediction heads."""
    tokens = w.seq * t.mbs / t.cp
    rate = hardware.bandwidth * site.memory_efficiency
    group = group_of(t.tp, np.ones_like(t.tp), hardware, site)
    reduce = np.where(t.sp > 0, 0.5, 1.0) * all_reduce(group, tokens * w.hidden * w.element)
    first = reduce * 2 + tokens * w.hidden * w.element * 4 / rate
    half = replace(hardware, peak=hardware.half_peak, low_precision=np.zeros_like(hardware.low_precision))
    logits = sum(linear_seconds(tokens, w.vocab / t.tp, w.hidden, half, site))
    loss = tokens * w.vocab / t.tp * site.loss_bytes / rate
    last = (logits + loss + reduce) * (1 + w.extra_layers)
    _, _, embedding, head = parameters_by_rank(w, t)
    m = micro_batches(w, t)
    added = ADDED_GRADIENT_BYTES * (m - 1) / m  # the first micro-batch's gradient is taken as it is
    here = np.asarray(site.trained_here) * w.trainable / rate
    first = first + embedding * (EMBEDDING_GRADIENT_BYTES + added) * here
    return EndCost(first, last + head * (HEAD_GRADIENT_BYTES + added + _cast_bytes(w, site)) * here)


def parameters_by_rank(w: Work, t: Table) -> tuple[Floats, Floats, Floats, Floats]:
    """Parameters of one device: dense and expert ones of one layer, of the first end, of the last end."""
    p = parameters(w)
    share = w.moe_layers / w.layers
    dense = (
        (p.attention_split + (1 - share) * p.dense_split + share * p.moe_split) / t.tp
        + p.attention_whole
        + (1 - share) * p.dense_whole
        + share * p.moe_whole
    )
    expert = share * p.expert / (t.ep * t.expert_tp)
    first = p.embedding / t.tp
    # Tied weights are held once when both ends share a rank.
    last = np.where((w.tied > 0) & ~ends_meet(t), w.vocab * w.hidden, p.head) / t.tp + p.final_norm
    return dense, expert, first, last


def step_terms(w: Work, t: Table, hardware: Hardware, site: Site) -> dict[str, Floats]:
    """Seconds by term, each [n]; they add up to the step."""
    m = micro_batches(w, t)
    layer = layer_cost(w, t, hardware, site)
    ends = end_cost(w, t, hardware, site)
    passes = layer.forward.seconds + layer.backward.seconds
    again = layer.recomputed * _recomputed_share(t)
    whole = passes + again
    only, meet = t.pp == 1, ends_meet(t)
    first = t.first_layers * whole + ends.first + meet * ends.last
    last = np.where(only, first, t.last_layers * whole + ~meet * ends.last)
    inner = t.inner_layers * whole
    slowest = np.maximum(np.maximum(first, last), inner)
    every = np.where(only, first, w.layers * whole + ends.first + ends.last)
    crowd = np.where(only, t.first_layers, np.maximum(t.inner_layers, np.maximum(t.first_layers, t.last_layers)))
    slow_layers = np.select([slowest == inner, slowest == first], [t.inner_layers, t.first_layers], t.last_layers)
    slow_layers = np.where(only, t.first_layers, slow_layers)
    slow_end = slowest - slow_layers * whole
    bubble = _bubble(t, m, every - slowest, slowest, layer, crowd)
    transfer = _pipeline_seconds(w, t, m, hardware, site)
    repeated = m * slow_layers
    data, optimizer = _update_seconds(w, t, m, layer, repeated, hardware, site)
    f, b = layer.forward, layer.backward
    return {
        "matmul": repeated * (f.matmul + b.matmul),
        "attention": repeated * (f.attention + b.attention),
        "pointwise": repeated * (f.pointwise + b.pointwise),
        "overhead": repeated * (f.overhead + b.overhead) + site.step_overhead_s,
        "recompute": repeated * again,
        "ends": m * slow_end,
        "tensor_parallel": repeated * (f.tensor + b.tensor),
        "context_parallel": repeated * (f.context + b.context),
        "expert_parallel": repeated * (f.expert + b.expert),
        "pipeline_transfer": transfer,
        "bubble": bubble,
        "data_parallel": data,
        "optimizer": optimizer,
    }


def rank_seconds(w: Work, t: Table, hardware: Hardware, site: Site) -> tuple[Floats, Floats, Floats, EndCost]:
    """Forward, backward (recomputation included) and weight-gradient seconds of one layer, and the ends', each [n]."""
    layer = layer_cost(w, t, hardware, site)
    again = layer.recomputed * _recomputed_share(t)
    return layer.forward.seconds, layer.backward.seconds + again, layer.weight_seconds, end_cost(w, t, hardware, site)


def _recomputed_share(t: Table) -> Floats:
    """Of a rank's layers, the part that full recomputation covers."""
    return np.where(t.recompute_layers > 0, np.minimum(1.0, t.recompute_layers * t.vpp / t.first_layers), 1.0)


def _bubble(t: Table, m: Floats, others: Floats, slowest: Floats, layer: LayerCost, layers: Floats) -> Floats:
    """Idle seconds of the slowest rank, as the event simulation finds them.

    Chunks divide the way through the pipeline; zero bubble (arXiv 2401.10241) fills it with weight gradients. DualPipe
    cut in half (arXiv 2412.19437) has two chunks in a V and the bubble of zero bubble's V.
    """
    filled = np.maximum(0.0, others - 2 * (t.pp - 1) * layers * layer.weight_seconds)
    split = (t.schedule == ZERO_BUBBLE) | (t.schedule == DUALPIPE_V)
    return np.select([t.pp == 1, split, t.schedule == INTERLEAVED], [0.0, filled / t.vpp, others / t.vpp], others)


def _pipeline_seconds(w: Work, t: Table, m: Floats, hardware: Hardware, site: Site) -> Floats:
    """Sends between stages waited for: two a micro-batch and chunk, and one way through at the ends."""
    size = w.seq * t.mbs / t.cp * w.hidden * w.element / t.tp
    hop = point_to_point(t.tp * t.cp * t.dp, size, hardware, site)
    chunks = np.where(t.schedule == INTERLEAVED, t.vpp, 1.0)
    return np.where(t.pp > 1, hop * (2 * m * chunks + 2 * (t.pp - 1)), 0.0)


def _update_seconds(
    w: Work, t: Table, m: Floats, layer: LayerCost, repeated: Floats, hardware: Hardware, site: Site
) -> tuple[Floats, Floats]:
    """Exposed data-parallel traffic and the optimizer's own time."""
    dense, expert, first, last = parameters_by_rank(w, t)
    layers = np.maximum(t.inner_layers, np.maximum(t.first_layers, t.last_layers))
    ends = np.where(ends_meet(t), first + last, np.maximum(first, last))
    held = layers * (dense + expert) + ends
    replicas = t.dp * t.cp
    group = group_of(t.shard, t.tp, hardware, site)
    everyone = group_of(replicas, t.tp, hardware, site)
    reduce = np.where(
        t.zero > 0,
        all_gather(group, held * site.reduce_bytes) + all_gather(group, held * w.element),
        all_reduce(everyone, held * site.reduce_bytes),
    )
    fully = m * (2 * all_gather(group, held * w.element) + all_gather(group, held * site.reduce_bytes))
    traffic = np.where(t.zero == 3, fully, reduce)
    beside = np.where(t.zero == 3, m, 1.0) * layers * layer.backward.seconds
    hidden = np.minimum(traffic * site.data_overlap * t.overlap_data, beside)
    rate = hardware.bandwidth * site.memory_efficiency
    shard = np.where(t.zero > 0, t.shard, 1.0)
    optimizer = held * (CLIP_BYTES + ADAM_BYTES / shard) / rate
    return traffic - hidden, optimizer * w.trainable
