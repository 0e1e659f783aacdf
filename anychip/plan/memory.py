"""Bytes on a device by term: weights, gradients, optimizer, activations by schedule depth, logits, buffers.

Activations follow arXiv 2205.05198 (34 s b h of a layer and what tensor and sequence parallelism divide), written out
tensor by tensor so that gated, grouped, latent and expert layers have theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.plan import memory_here
from anychip.plan.ranks import Rank, in_flight
from anychip.plan.shapes import Work, attention_shapes, parameters
from anychip.plan.table import FULL, SELECTIVE, Table, micro_batches
from anychip.plan.types import Floats, Site

TERMS = (*memory_here.TERMS, "reserved")


def rank_memory(w: Work, t: Table, rank: Rank, site: Site) -> dict[str, Floats]:
    """Bytes of one pipeline rank's devices by term, each [n]."""
    if np.all(site.trained_here):
        moment = memory_here.fullest_moment(w, t, rank)
        return {**moment, "reserved": site.reserved_bytes + site.allocator_slack * np.asarray(sum(moment.values()))}
    dense, expert = _parameters_held(w, t, rank)
    replicas = t.dp * t.cp
    shard = np.minimum(t.shard, replicas)
    expert_shard = np.maximum(1.0, shard * t.tp / (t.ep * t.expert_tp))
    held = dense + expert
    half = w.element < 4  # fp32 training has no master copy
    one, whole = np.ones_like(shard), np.ones_like(expert_shard)
    state = np.where(half, site.optimizer_bytes, 8.0) * w.trainable
    gradient = np.where(half, site.gradient_bytes, 4.0) * w.trainable
    weights = _sharded(w.element, dense, expert, *_divisors(t.zero >= 3, shard, expert_shard, one, whole))
    gradients = _sharded(gradient, dense, expert, *_divisors(t.zero >= 2, shard, expert_shard, one, whole))
    optimizer = _sharded(state, dense, expert, *_divisors(t.zero >= 1, shard, expert_shard, one, whole))
    layer = layer_activation_bytes(w, t, rank.share, site)
    activations = _activations(w, t, rank, layer, site)
    logits, scratch = _head_bytes(w, t, rank, site)
    gathered = np.where(t.zero >= 3, 2 * w.element * held / np.maximum(rank.layers, 1), 0.0)
    tensors = weights + gradients + optimizer + activations + logits + scratch + gathered
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "logits": logits,
        "buffers": scratch + gathered,
        "reserved": site.reserved_bytes + site.allocator_slack * tensors,
    }


def allocated_bytes(terms: dict[str, Floats]) -> Floats:
    """What the framework's allocator hands out: everything but the device's context and the allocator's slack."""
    return np.asarray(sum(value for name, value in terms.items() if name != "reserved"))


def _divisors(
    sharded: npt.NDArray[np.bool_], shard: Floats, expert_shard: Floats, one: Floats, whole: Floats
) -> tuple[Floats, Floats]:
    return np.where(sharded, shard, one), np.where(sharded, expert_shard, whole)


def _sharded(size: Floats, dense: Floats, expert: Floats, shard: Floats, expert_shard: Floats) -> Floats:
    return np.asarray(size * (dense / shard + expert / expert_shard))


def _parameters_held(w: Work, t: Table, rank: Rank) -> tuple[Floats, Floats]:
    """Parameters on one device: those replicated over data-parallel ranks, and its routed experts."""
    p = parameters(w)
    share = rank.share
    layer = (
        (p.attention_split + (1 - share) * p.dense_split + share * p.moe_split) / t.tp
        + p.attention_whole
        + (1 - share) * p.dense_whole
        + share * p.moe_whole
    )
    copy = rank.last * np.where((w.tied > 0) & (rank.first == 0), w.vocab * w.hidden, p.head)
    ends = (rank.first * p.embedding + copy) / t.tp + rank.last * p.final_norm
    extra = rank.last * w.extra_layers * (layer + 2 * w.hidden**2 / t.tp)
    expert = share * p.expert / (t.ep * t.expert_tp)
    return rank.layers * layer + ends + extra, (rank.layers + rank.last * w.extra_layers) * expert


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that the mean layer keeps of one micro-batch on one device."""

    kept: Floats  # without recomputation
    selective: Floats  # without the scores of unfused attention
    boundary: Floats  # only the layer's input


def layer_activation_bytes(w: Work, t: Table, share: Floats, site: Site) -> LayerActivations:
    """Tensors saved for the backward pass of the mean layer, `share` of the layers having experts."""
    tokens = w.seq * t.mbs / t.cp
    split = tokens / t.tp
    whole = tokens / np.where(t.sp > 0, t.tp, 1.0)
    a = attention_shapes(w)
    e = w.element
    norms = 8.0 / 2 * e * w.hidden + np.asarray(site.dropout) * 2.0 * w.hidden
    plain = (w.heads + 2 * w.kv_heads) * w.key_dim
    latent = w.heads * (2 * w.key_dim + w.value_dim) + a.down_out + w.q_rank + w.kv_rank + w.heads * w.value_dim
    attention = e * (np.where(w.is_latent > 0, latent, plain) + a.out_in)
    dense = e * w.ffn * (2 + w.gated)
    shared = e * w.shared_ffn * (2 + w.gated)
    # Routed tokens: what was dispatched, the expert's inner tensors, its output before it is weighed.
    routed = w.top_k * e * (2 * w.hidden + (2 + w.gated) * w.moe_ffn)
    score = np.where(site.fused_attention, 0.0, (2 * e + np.asarray(site.dropout)) * w.heads * w.seq / w.hidden)
    scores = score * w.hidden * split
    body = whole * norms + split * (attention + (1 - share) * dense + share * shared)
    body = body + share * routed * tokens / np.where(t.expert_tp > 1, t.tp, np.where(t.sp > 0, t.tp, 1.0))
    return LayerActivations(kept=body + scores, selective=body, boundary=whole * e * w.hidden)


def _activations(w: Work, t: Table, rank: Rank, layer: LayerActivations, site: Site) -> Floats:
    """Activations of all micro-batches that a rank holds at its fullest moment."""
    m = micro_batches(w, t)
    depth = in_flight(t, rank.position, m)
    partly = np.where(
        t.recompute_layers > 0, np.minimum(1.0, t.recompute_layers * t.vpp / np.maximum(rank.layers, 1)), 1.0
    )
    full = (t.recompute == FULL) * partly
    kept = np.where(t.recompute == SELECTIVE, layer.selective, layer.kept)
    of_layer = full * layer.boundary + (1 - full) * kept
    live = (full > 0) * (layer.kept - layer.boundary)  # the layer that is being recomputed
    embedding = rank.first * depth * layer.boundary * np.asarray(site.dropout)
    return np.asarray(depth * rank.layers * of_layer + live + embedding)


def _head_bytes(w: Work, t: Table, rank: Rank, site: Site) -> tuple[Floats, Floats]:
    """Logits at their peak, and weight gradients that exist beside the accumulated ones."""
    tokens = w.seq * t.mbs / t.cp
    present = np.where(w.loss_chunk > 0, np.minimum(w.loss_chunk, tokens), tokens)
    logits = rank.last * present * w.vocab / t.tp * site.logits_bytes
    # Grouped products add to the accumulated gradients of routed experts directly.
    layer = w.element * w.hidden * np.where(rank.share > 0, w.shared_ffn, w.ffn) * (2 + w.gated) / t.tp
    head = rank.last * w.element * w.vocab * w.hidden / t.tp
    return logits, np.asarray(site.layer_gradient_scratch * (layer + head))
