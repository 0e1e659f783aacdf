"""What a workload is made of: matrices, parameters and FLOPs of one layer, for every family the planner knows.

For the families that the training code knows this agrees with `anychip.model.arithmetic` number for number; a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from anychip.plan.types import Experts, Floats, LatentAttention, Workload
from anychip.recipe.schema import Recipe

_DTYPES: dict[str, Any] = {"auto": "bf16", "bf16": "bf16", "fp32": "fp32"}


def workload_of(recipe: Recipe) -> Workload:
    """The step that a recipe describes."""
    model, training = recipe.model, recipe.training
    latent = experts = None
    if model.latent:
        latent = LatentAttention(
            q_rank=model.q_lora_rank,
            kv_rank=model.kv_lora_rank,
            nope_dim=model.qk_nope_head_dim,
            rope_dim=model.qk_rope_head_dim,
            value_dim=model.v_head_dim,
        )
    if model.n_routed_experts:
        experts = Experts(
            count=model.n_routed_experts,
            top_k=model.num_experts_per_tok,
            ffn=model.moe_intermediate_size,
            shared_ffn=model.n_shared_experts * model.moe_intermediate_size,
            dense_layers=model.first_k_dense_replace,
            ranking_bias=model.topk_method == "noaux_tc",
        )
    return Workload(
        name=recipe.name,
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        ffn=model.intermediate_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
        seq_length=training.seq_length,
        global_batch=training.global_batch_size,
        dtype=_DTYPES[training.compute_dtype],
        biases=model.biases,
        tied_embeddings=model.tie_word_embeddings,
        latent=latent,
        experts=experts,
        predicted_tokens=model.num_nextn_predict_layers,
        loss_chunk_tokens=training.loss_chunk_tokens,
    )


@dataclass(frozen=True)
class Work:
    """Workloads as arrays, one entry a workload, so that the cost model runs over rows and layouts alike.

    Every field broadcasts against the layouts: shape [] or [n]. Counts are float64 because products overflow int32.
    """

    layers: Floats
    moe_layers: Floats
    dense_first: Floats  # leading layers without experts
    hidden: Floats
    ffn: Floats
    gated: Floats  # 1 or 0
    heads: Floats
    kv_heads: Floats
    key_dim: Floats  # width of a query or key head
    value_dim: Floats
    q_rank: Floats  # latent attention; 0 without
    kv_rank: Floats
    rope_dim: Floats
    is_latent: Floats
    vocab: Floats
    seq: Floats
    batch: Floats
    experts: Floats  # 0: dense
    top_k: Floats
    moe_ffn: Floats
    shared_ffn: Floats
    ranking_bias: Floats  # 1: a router has a bias an expert
    tied: Floats
    positions: Floats
    extra_layers: Floats  # multi-token prediction
    layer_norm: Floats  # 1: LayerNorm with bias, 0: RMSNorm
    bias_all: Floats
    bias_telechat2: Floats
    causal: Floats
    span: Floats  # mean keys that a query meets, the upper triangle counted
    loss_chunk: Floats  # tokens; 0: a whole micro-batch
    element: Floats  # bytes of an activation
    trainable: Floats

    def take(self, index: Any) -> Work:
        """The same workloads in another order or number."""
        return Work(**{field.name: np.atleast_1d(getattr(self, field.name))[index] for field in fields(self)})


def work_of(*workloads: Workload) -> Work:
    """Arrays of shape [] for one workload, [n] for several."""
    rows = [_row(workload) for workload in workloads]
    if len(rows) == 1:
        return Work(**{name: np.float64(value) for name, value in rows[0].items()})
    return Work(**{name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]})


def _row(w: Workload) -> dict[str, float]:
    latent = w.latent or LatentAttention(0, 0, 0, 0, 0)
    experts = w.experts or Experts(0, 0, 0)
    with_experts = max(0, w.layers - experts.dense_layers) // experts.every if w.experts else 0
    return {
        "layers": w.layers,
        "moe_layers": with_experts,
        "dense_first": experts.dense_layers,
        "hidden": w.hidden,
        "ffn": w.ffn,
        "gated": float(w.gated),
        "heads": w.heads,
        "kv_heads": w.kv_heads,
        "key_dim": latent.nope_dim + latent.rope_dim if w.latent else w.head_dim,
        "value_dim": latent.value_dim if w.latent else w.head_dim,
        "q_rank": latent.q_rank,
        "kv_rank": latent.kv_rank,
        "rope_dim": latent.rope_dim,
        "is_latent": float(w.latent is not None),
        "vocab": w.vocab,
        "seq": w.seq_length,
        "batch": w.global_batch,
        "experts": experts.count,
        "top_k": experts.top_k,
        "moe_ffn": experts.ffn,
        "shared_ffn": experts.shared_ffn,
        "ranking_bias": float(experts.ranking_bias),
        "tied": float(w.tied_embeddings),
        "positions": w.learned_positions,
        "extra_layers": w.predicted_tokens,
        "layer_norm": float(w.norm == "layer"),
        "bias_all": float(w.biases == "all"),
        "bias_telechat2": float(w.biases == "telechat2"),
        "causal": float(w.causal),
        "span": _span(w),
        "loss_chunk": w.loss_chunk_tokens,
        "element": 4.0 if w.dtype == "fp32" else 2.0,
        "trainable": w.trainable_fraction,
    }


def _span(w: Workload) -> float:
    """Keys a query meets in a kernel that works on the full square: a causal window is twice its triangle's mean."""
    if not 0 < w.window < w.seq_length:
        return w.seq_length
    return min(w.seq_length, 2.0 * (w.window - w.window**2 / (2.0 * w.seq_length)))


@dataclass(frozen=True)
class AttentionShapes:
    """Output and input widths of the projections of one attention block, before tensor parallelism.

    Plain attention has one fused projection of queries, keys and values (`up_kv` is empty); latent attention goes
    down to the ranks and up again.
    """

    down_out: Floats  # replicated over tensor-parallel ranks; input is hidden
    up_q_out: Floats
    up_q_in: Floats
    up_kv_out: Floats
    up_kv_in: Floats
    out_in: Floats  # output projection; output is hidden


def attention_shapes(w: Work) -> AttentionShapes:
    """Projections of one layer, each [out, in]."""
    queries = w.heads * w.key_dim
    plain = queries + 2 * w.kv_heads * w.key_dim
    nope = w.key_dim - w.rope_dim
    direct_q = w.q_rank == 0  # latent attention without query compression projects queries from hidden
    return AttentionShapes(
        down_out=w.is_latent * (w.q_rank + w.kv_rank + w.rope_dim),
        up_q_out=np.where(w.is_latent > 0, queries, plain),
        up_q_in=np.where((w.is_latent > 0) & ~direct_q, w.q_rank, w.hidden),
        up_kv_out=w.is_latent * w.heads * (nope + w.value_dim),
        up_kv_in=w.kv_rank,
        out_in=w.heads * w.value_dim,
    )


@dataclass(frozen=True)
class Parameters:
    """Counts of one layer by how they are split, and of the ends of the model."""

    attention_split: Floats  # over tp
    attention_whole: Floats  # on every tp rank: norms, latent down projections
    dense_split: Floats  # dense feed-forward, over tp
    dense_whole: Floats
    expert: Floats  # one layer's routed experts, over ep and expert_tp
    moe_split: Floats  # shared experts, over tp
    moe_whole: Floats  # router
    embedding: Floats
    head: Floats  # 0 when tied
    final_norm: Floats

    def layer(self, moe: Floats | float) -> Floats:
        """Mean of one layer when `moe` is the share of layers with experts."""
        dense = self.dense_split + self.dense_whole
        experts = self.expert + self.moe_split + self.moe_whole
        return np.asarray(self.attention_split + self.attention_whole + (1 - moe) * dense + moe * experts)

    def total(self, w: Work) -> Floats:
        """All parameters of the model; multi-token prediction adds whole layers."""
        share = w.moe_layers / w.layers
        ends = self.embedding + self.head + self.final_norm
        extra = w.extra_layers * (self.layer(np.minimum(1.0, w.moe_layers)) + 2 * w.hidden**2 + 3 * w.hidden)
        return np.asarray(w.layers * self.layer(share) + ends + extra)


def parameters(w: Work) -> Parameters:
    """Exact for the families of `anychip.model`; norms and biases of others by their usual place."""
    a = attention_shapes(w)
    norm = w.hidden * (1 + w.layer_norm)
    up = w.hidden * (1 + w.gated)
    split = a.up_q_out * a.up_q_in + a.up_kv_out * a.up_kv_in + w.hidden * a.out_in
    return Parameters(
        attention_split=split + w.bias_all * a.up_q_out,
        attention_whole=(
            a.down_out * w.hidden
            + w.is_latent * (w.q_rank + w.kv_rank)
            + norm
            + (w.bias_all + w.bias_telechat2) * w.hidden
        ),
        dense_split=w.ffn * (up + w.hidden) + w.bias_all * w.ffn * (1 + w.gated),
        dense_whole=norm + (w.bias_all + w.bias_telechat2) * w.hidden,
        expert=w.experts * (w.moe_ffn * (up + w.hidden) + w.bias_telechat2 * w.hidden),
        moe_split=w.shared_ffn * (up + w.hidden),
        moe_whole=(norm + w.experts * (w.hidden + w.ranking_bias) + w.bias_telechat2 * (w.shared_ffn > 0) * w.hidden),
        embedding=w.vocab * w.hidden + w.positions * w.hidden,
        head=(1 - w.tied) * w.vocab * w.hidden,
        final_norm=norm,
    )


def num_parameters(workload: Workload) -> int:
    """All parameters of a workload's model."""
    w = work_of(workload)
    return round(float(parameters(w).total(w)))


def matrix_parameters_per_token(w: Work) -> Floats:
    """Weights of matrix products that one token meets: experts by top_k, output head once, no input embedding."""
    a = attention_shapes(w)
    attention = a.down_out * w.hidden + a.up_q_out * a.up_q_in + a.up_kv_out * a.up_kv_in + w.hidden * a.out_in
    up = w.hidden * (2 + w.gated)
    moe = up * (w.top_k * w.moe_ffn + w.shared_ffn) + w.experts * w.hidden
    dense_layers = w.layers - w.moe_layers
    layers = w.layers * attention + dense_layers * w.ffn * up + w.moe_layers * moe
    extra = w.extra_layers * (
        attention + np.where(w.moe_layers > 0, moe, w.ffn * up) + 2 * w.hidden**2 + w.vocab * w.hidden
    )
    return np.asarray(layers + extra + w.vocab * w.hidden)


def flops_per_token(w: Work, *, halve_attention: bool = True) -> Floats:
    """Forward and backward FLOPs of one token; recomputation is not counted (see `model.arithmetic`)."""
    width = w.heads * (w.key_dim + w.value_dim)
    square = 6 * (w.layers + w.extra_layers) * width * w.span
    halved = np.where((w.causal > 0) & halve_attention, 0.5, 1.0)
    return np.asarray(6 * matrix_parameters_per_token(w) + halved * square)
