"""Multi-token prediction (arXiv 2412.19437, section 2.2): in training, modules behind the last layer predict one token
further each, from the model's own states and the tokens that come next. Embedding and head are the model's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.layers import Linear, RMSNorm
from anychip.recipe.schema import ModelConfig


class FurtherToken(nn.Module):
    """norm(layer(eh_proj([enorm(embedding of the next token); hnorm(state)])))."""

    def __init__(self, config: ModelConfig, layer: nn.Module, operators: Operators = reference) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = layer
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        mask: object,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Normed states [b, s, h] of the depth before, and the embeddings [b, s, h] of the tokens that follow by one
        more each -> normed states [b, s, h] of this depth."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.norm(self.layer(joined, cos, sin, scale, None, mask, keys))


def following(tokens: Tensor, depth: int) -> Tensor:
    """Tokens [b, s] moved `depth` places to the front; token 0 where none follows."""
    return torch.nn.functional.pad(tokens[:, depth:], (0, min(depth, tokens.shape[1])))
