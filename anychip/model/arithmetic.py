"""Parameters and floating-point operations from a configuration alone (no torch: the planner shares this file).

A multiply-add counts as two FLOPs. The input embedding is a look-up and costs none; the output head is a product and
counts. Norms, activations and softmax are left out, as is customary (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from anychip.recipe.schema import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Logical name and shape ([out, in] for matrices) of every parameter, in the order of the forward pass."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.self_attn.o_proj.bias", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{prefix}.mlp.down_proj.bias", (hidden,)
    yield "norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def num_parameters(config: ModelConfig) -> int:
    """Exact number of parameters, input embedding and output head included."""
    total = 0
    for _, shape in parameter_shapes(config):
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


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
    """6 FLOPs a matrix parameter (2 forward, 4 backward) plus attention scores and values over `seq_length`."""
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in parameter_shapes(config)
        if len(shape) == 2 and name != "embed_tokens.weight"
    )
    square = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_length
    return FlopsPerToken(model=6.0 * matrices + square / 2, full=6.0 * matrices + square)


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token keeps in the key/value cache over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_element
