"""Parameters and floating-point operations from a configuration alone (no torch: the planner shares this file).

A multiply-add counts as two FLOPs. The input embedding is a look-up and costs none; the output head is a product and
counts. Norms, activations and softmax are left out, as is customary (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from anychip.recipe.schema import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Logical name and shape ([out, in] for matrices, [experts, out, in] for those of experts) of every parameter, in
    the order of the forward pass."""
    hidden = config.hidden_size
    yield "embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        yield from layer_shapes(config, layer, f"layers.{layer}")
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{depth}"
        yield f"{prefix}.enorm.weight", (hidden,)
        yield f"{prefix}.hnorm.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        yield from layer_shapes(config, config.num_hidden_layers + depth, f"{prefix}.layer")
        yield f"{prefix}.norm.weight", (hidden,)


def layer_shapes(config: ModelConfig, layer: int, prefix: str) -> Iterator[tuple[str, Shape]]:
    """Parameters of one layer, counted from 0, under names that begin with `prefix`."""
    hidden = config.hidden_size
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield from (_latent_shapes if config.latent else _attention_shapes)(config, f"{prefix}.self_attn")
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    if config.has_experts(layer):
        yield from _expert_shapes(config, f"{prefix}.mlp")
    else:
        yield from _mlp_shapes(config, f"{prefix}.mlp", config.intermediate_size)


def _attention_shapes(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield f"{prefix}.q_proj.weight", (queries, hidden)
    yield f"{prefix}.k_proj.weight", (keys, hidden)
    yield f"{prefix}.v_proj.weight", (keys, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, queries)
    if config.biases == "telechat2":
        yield f"{prefix}.o_proj.bias", (hidden,)


def _latent_shapes(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.head_dim
    if config.q_lora_rank:
        yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (queries, config.q_lora_rank)
    else:
        yield f"{prefix}.q_proj.weight", (queries, hidden)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (latent,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield f"{prefix}.o_proj.weight", (hidden, heads * config.v_head_dim)
    if config.biases == "telechat2":
        yield f"{prefix}.o_proj.bias", (hidden,)


def _mlp_shapes(
    config: ModelConfig, prefix: str, inner: int, experts: tuple[int, ...] = ()
) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield f"{prefix}.gate_proj.weight", (*experts, inner, hidden)
    yield f"{prefix}.up_proj.weight", (*experts, inner, hidden)
    yield f"{prefix}.down_proj.weight", (*experts, hidden, inner)
    if config.biases == "telechat2":
        yield f"{prefix}.down_proj.bias", (*experts, hidden)


def _expert_shapes(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    count, inner = config.n_routed_experts, config.moe_intermediate_size
    yield f"{prefix}.gate.weight", (count, config.hidden_size)
    if config.topk_method == "noaux_tc":
        yield f"{prefix}.gate.e_score_correction_bias", (count,)
    yield from _mlp_shapes(config, f"{prefix}.experts", inner, (count,))
    if config.n_shared_experts:
        yield from _mlp_shapes(config, f"{prefix}.shared_experts", config.n_shared_experts * inner)


def num_parameters(config: ModelConfig) -> int:
    """Exact number of parameters: input embedding, output head and modules for further tokens included."""
    return sum(prod(shape) for _, shape in parameter_shapes(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets at inference: of the experts those it chooses, embedding and head in full,
    modules for further tokens left out."""
    return sum(
        prod(shape) // config.n_routed_experts * config.num_experts_per_tok if is_expert(name) else prod(shape)
        for name, shape in parameter_shapes(config)
        if not name.startswith("mtp.")
    )


def is_expert(name: str) -> bool:
    """Whether a parameter of this logical name holds one part for each routed expert."""
    return ".mlp.experts." in name


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward FLOPs of one training token.

    `model` halves attention because a causal model needs only the lower triangle: MFU is stated with it.
    `full` counts the whole square, the convention of papers that do not halve.
    Recomputation is in neither.
    """

    model: float
    full: float


def flops_per_token(config: ModelConfig, seq_length: int) -> FlopsPerToken:
    """6 FLOPs a matrix parameter (2 forward, 4 backward) that a token meets, plus attention scores and values over
    `seq_length`. A module for a further token is a layer, its joining product and the head once more."""
    matrices = sum(_matrix_size(config, name, shape) for name, shape in parameter_shapes(config))
    head = config.vocab_size * config.hidden_size
    matrices += head * (config.num_nextn_predict_layers + config.tie_word_embeddings)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    square = 6 * layers * config.num_attention_heads * (config.head_dim + config.value_dim) * seq_length
    return FlopsPerToken(model=6.0 * matrices + square / 2, full=6.0 * matrices + square)


def _matrix_size(config: ModelConfig, name: str, shape: Shape) -> int:
    """Weights of the products that one token passes through in this tensor."""
    if is_expert(name):
        return prod(shape) // config.n_routed_experts * config.num_experts_per_tok if len(shape) == 3 else 0
    return prod(shape) if len(shape) == 2 and name != "embed_tokens.weight" else 0


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token keeps in the key/value cache over all layers; with latent attention its latent."""
    if config.latent:
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_element
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_element
