"""Logits of a model that need not fit into memory: one layer is there at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anychip import alive
from anychip.model.decoder import DecoderLayer
from anychip.model.experts import MixtureOfExperts
from anychip.model.layers import RMSNorm
from anychip.model.rope import rotary
from anychip.recipe.schema import ModelConfig

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Passed:
    """`logits` [tokens, vocab_size] in the widest of fp32 and the compute dtype; `distances`: how much each layer
    changes its input, |out - in| / |in| over all tokens; `choices`: the experts of each token in each layer,
    [tokens, k] in rising order, None where there are none."""

    logits: Tensor
    distances: list[float]
    choices: list[Tensor | None]


@torch.no_grad()
def forward_by_layer(config: ModelConfig, read: Read, tokens: Tensor, dtype: torch.dtype) -> Passed:
    """Logits of one sequence, int64 [tokens]. `read` gives a parameter by name, in fp64 for fp64 and fp32 else, as
    training keeps them; products are in `dtype`."""
    tables = rotary(config, 0, len(tokens), len(tokens))
    x = read("embed_tokens.weight")[tokens][None].to(dtype) * config.input_mult
    distances, choices = [], []
    for number in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(config, number)
        _fill(layer, read, f"layers.{number}.")
        chosen: list[Tensor] = []
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.gate.register_forward_hook(lambda _, __, choice: chosen.append(choice.experts))  # noqa: B023
        out = layer(x, *tables)
        choices.append(chosen[0].sort(-1).values if chosen else None)
        distances.append(float((out - x).norm() / x.norm()))
        alive.progressed()
        x = out
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    _fill(norm, read, "norm.")
    wide = torch.promote_types(dtype, torch.float32)
    head = read("embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return Passed((norm(x)[0] * config.logit_scale @ head.to(dtype).t()).to(wide), distances, choices)


def _fill(module: nn.Module, read: Read, prefix: str) -> None:
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(read(prefix + name), requires_grad=False))
        alive.progressed()
