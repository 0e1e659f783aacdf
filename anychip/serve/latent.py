"""Latent attention as one step of decoding computes it: all heads attend to the cached latents themselves.

Shapes: t tokens of the step, n heads, p and r widths of a query without and with position, c the latent's, v a value's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators.contract import RmsNorm
from anychip.model.latent_attention import LatentAttention
from anychip.recipe.schema import ModelConfig
from anychip.serve.attention import Attend
from anychip.serve.parts import Part
from anychip.serve.products import Precision, Product, make_product


@dataclass(frozen=True)
class LatentWeights:
    """`up_keys` [n, p, c] is applied to queries, `up_values` [n, v, c] to what comes out of attention."""

    queries: tuple[Product, Tensor, Product] | Product  # down, norm, up; or straight from the input
    down: Product
    norm: Tensor
    up_keys: Tensor
    up_values: Tensor
    rms_norm: RmsNorm
    eps: float

    def before(self, x: Tensor) -> Tensor:
        """Normed states [t, h] -> [t, n * (p + r) + c + r]: queries, the latent, the key's turning part."""
        if isinstance(self.queries, tuple):
            down, norm, up = self.queries
            q = up(self.rms_norm(down(x), norm, self.eps))
        else:
            q = self.queries(x)
        latent, turning = self.down(x).tensor_split((len(self.norm),), dim=-1)
        return torch.cat((q, self.rms_norm(latent, self.norm, self.eps), turning), dim=-1)

    def attend(self, layer: int, rows: Tensor, cos: Tensor, sin: Tensor, attention: Attend) -> Tensor:
        """What `before` gave, and tables [t, 1, r] -> mixed values [t, n * v]."""
        heads, still, latent = self.up_keys.shape
        rope = cos.shape[-1]
        q, kept = rows.tensor_split((heads * (still + rope),), dim=-1)
        q_still, q_turning = q.reshape(len(rows), heads, -1).split((still, rope), dim=-1)
        k_latent, k_turning = kept[:, None].split((latent, rope), dim=-1)
        seen = torch.einsum("tnp,npc->tnc", q_still, self.up_keys)
        key = torch.cat((k_latent, _turned(k_turning, cos, sin)), dim=-1)  # [t, 1, c + r]
        mixed = attention(layer, torch.cat((seen, _turned(q_turning, cos, sin)), dim=-1), key, key)
        found = mixed.view(len(rows), heads, -1)[..., :latent]
        return torch.einsum("tnc,nvc->tnv", found, self.up_values).flatten(1)


def latent_weights(
    attention: LatentAttention, config: ModelConfig, precision: Precision, rms_norm: RmsNorm, part: Part
) -> LatentWeights:
    """Copies of an attention's weights, as they are read: of the heads that are here. Latents are made by everyone."""
    dtype = precision.activations

    def product(weight: Tensor) -> Product:
        return make_product(weight, None, precision)

    def norm(module: Any) -> Tensor:
        weight: Tensor = module.weight.detach().float()
        return weight

    up = part.rows(attention.kv_b_proj.weight).detach().to(dtype)
    up = up.view(-1, attention.nope + attention.value, attention.latent)
    up_keys, up_values = up.split((attention.nope, attention.value), dim=1)
    queries: tuple[Product, Tensor, Product] | Product
    if attention.compressed:
        down, up_queries = attention.q_a_proj.weight, part.rows(attention.q_b_proj.weight)
        queries = product(down), norm(attention.q_a_layernorm), product(up_queries)
    else:
        queries = product(part.rows(attention.q_proj.weight))
    return LatentWeights(
        queries,
        product(attention.kv_a_proj_with_mqa.weight),
        norm(attention.kv_a_layernorm),
        up_keys.contiguous(),
        up_values.contiguous(),
        rms_norm,
        config.rms_norm_eps,
    )


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(cos.shape[-1] // 2, dims=-1), sin).to(x.dtype)
