"""What a trace holds, by logical name, in the order in which a training step computes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from anychip.recipe.schema import ModelConfig

Kind = Literal["parameter", "activation", "gradient", "parameter_gradient", "update"]
KINDS: tuple[Kind, ...] = ("parameter", "activation", "gradient", "parameter_gradient", "update")


@dataclass(frozen=True)
class Activation:
    """An output inside the decoder. `split`: what tensor parallelism gives each process of it."""

    name: str
    split: Literal["sequence", "columns"]


_ATTENTION = (
    Activation("self_attn.q_proj", "columns"),
    Activation("self_attn.k_proj", "columns"),
    Activation("self_attn.v_proj", "columns"),
    Activation("self_attn.rotated_q", "columns"),
    Activation("self_attn.rotated_k", "columns"),
    Activation("self_attn.attended", "columns"),
)
_LATENT_ATTENTION = (Activation("self_attn.kv_b_proj", "columns"),)
_MLP = (
    Activation("mlp.gate_proj", "columns"),
    Activation("mlp.up_proj", "columns"),
    Activation("mlp.swiglu", "columns"),
    Activation("mlp.down_proj", "sequence"),
)
_EXPERTS = (Activation("mlp", "sequence"),)  # inside, tokens are in the order of experts


def activations(config: ModelConfig) -> Iterator[Activation]:
    """All of a decoder, in the order of the forward pass."""
    yield Activation("embed_tokens", "sequence")
    for layer in range(config.num_hidden_layers):
        for activation in _of_a_layer(config, layer):
            yield Activation(f"layers.{layer}.{activation.name}", activation.split)
    yield Activation("norm", "sequence")


def _of_a_layer(config: ModelConfig, layer: int) -> Iterator[Activation]:
    yield Activation("input_layernorm", "sequence")
    if config.latent:
        yield Activation("self_attn.q_b_proj" if config.q_lora_rank else "self_attn.q_proj", "columns")
    yield from _LATENT_ATTENTION if config.latent else _ATTENTION
    yield Activation("self_attn.o_proj", "sequence")
    yield Activation("post_attention_layernorm", "sequence")
    yield from _EXPERTS if config.has_experts(layer) else _MLP
    yield Activation("output", "sequence")
