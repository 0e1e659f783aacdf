"""Logits of a model that need not fit into memory: one layer is there at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anychip.model.decoder import DecoderLayer
from anychip.model.layers import RMSNorm
from anychip.model.rope import rotary
from anychip.recipe.schema import ModelConfig

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Passed:
    """`logits` [tokens, vocab_size] in the widest of fp32 and the compute dtype; `distances`: how much each layer
    changes its input, |out - in| / |in| over all tokens."""

    logits: Tensor
    distances: list[float]


@torch.no_grad()
def forward_by_layer(config: ModelConfig, read: Read, tokens: Tensor, dtype: torch.dtype) -> Passed:
    """Logits of one sequence, int64 [tokens]. `read` gives a parameter by name, in fp64 for fp64 and fp32 else, as
    training keeps them; products are in `dtype`."""
    tables = rotary(config, 0, len(tokens), len(tokens))
    x = read("embed_tokens.weight")[tokens][None].to(dtype) * config.input_mult
    distances = []
    for number in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(config, number)
        _fill(layer, read, f"layers.{number}.")
        out = layer(x, *tables)
        distances.append(float((out - x).norm() / x.norm()))
        x = out
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    _fill(norm, read, "norm.")
    wide = torch.promote_types(dtype, torch.float32)
    head = read("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return Passed((norm(x)[0] * config.logit_scale @ head.to(dtype).t()).to(wide), distances)


def _fill(module: nn.Module, read: Read, prefix: str) -> None:
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(read(prefix + name), requires_grad=False))
