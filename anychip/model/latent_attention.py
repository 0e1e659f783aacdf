"""Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values of all heads are made from one narrow
latent a token, which is all that a cache keeps.

Shapes: b batch, s sequence, h hidden, n heads, c kv_lora_rank, r qk_rope_head_dim, p qk_nope_head_dim, v v_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.cache import KeyValueCache
from anychip.model.layers import Linear, RMSNorm
from anychip.model.remake import Remake
from anychip.recipe.schema import ModelConfig


class LatentAttention(nn.Module):
    """`attend` mixes the values; who splits the sequence replaces it from outside.

    A pass over a whole sequence makes every head's keys and values, wide in few; with a cache the up projections move
    to the queries and to what comes out, so that all heads attend to the cached latents themselves (section 2.1.2
    there): the same sums in another order.
    """

    def __init__(self, config: ModelConfig, layer: int, operators: Operators = reference) -> None:
        super().__init__()
        self.layer, self.latent = layer, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rotate, self.attend = operators.rotate, operators.attention
        heads, hidden = config.num_attention_heads, config.hidden_size
        queries = heads * (self.nope + self.rope)
        if config.q_lora_rank:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, operators)
            self.q_b_proj = Linear(config.q_lora_rank, queries, bias=False)
        else:
            self.q_proj = Linear(hidden, queries, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps, operators)
        self.kv_b_proj = Linear(self.latent, heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(heads * self.value, hidden, bias=config.biases == "telechat2")
        self.compressed = config.q_lora_rank > 0

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        cache: KeyValueCache | None,
        mask: Any,
        *,
        remake: Remake | None = None,
    ) -> Tensor:
        q = self._queries(x, remake)  # [b, s, n, p + r]
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        q_rope = self.rotate(q_rope, cos, sin)
        latent, k_rope = self.kv_a_proj_with_mqa(x, remake).split((self.latent, self.rope), dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = self.rotate(k_rope[:, :, None], cos, sin)  # [b, s, 1, r]
        if cache is None:
            mixed = self._attend(q_nope, q_rope, latent, k_rope, scale, mask)
        else:
            mixed = self._attend_cached(q_nope, q_rope, latent, k_rope, scale, mask, cache)
        return self.o_proj(mixed.flatten(2))

    def _queries(self, x: Tensor, remake: Remake | None) -> Tensor:
        if not self.compressed:
            q = self.q_proj(x, remake)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, remake)))
        return q.view(*q.shape[:2], -1, self.nope + self.rope)

    def _attend(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, scale: float, mask: Any
    ) -> Tensor:
        """-> [b, s, n, v]. Kernels take one width of head: values get zeros behind them."""
        keys = self.kv_b_proj(latent).view(*latent.shape[:2], -1, self.nope + self.value)
        k_nope, values = keys.split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
        v = F.pad(values, (0, self.nope + self.rope - self.value))
        mixed = self.attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, causal=True, mask=mask
        )
        return mixed.transpose(1, 2)[..., : self.value]

    def _attend_cached(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        scale: float,
        mask: Any,
        cache: KeyValueCache,
    ) -> Tensor:
        """-> [b, s, n, v]. One key head of width c + r, whose values are its first c numbers."""
        up = self.kv_b_proj.weight.to(latent.dtype).view(-1, self.nope + self.value, self.latent)  # [n, p + v, c]
        up_keys, up_values = up.split((self.nope, self.value), dim=1)
        q = torch.cat((torch.einsum("bsnp,npc->bsnc", q_nope, up_keys), q_rope), dim=-1)
        new = torch.cat((latent[:, :, None], k_rope), dim=-1).transpose(1, 2)  # [b, 1, s, c + r]
        kept, _ = cache.write(self.layer, new, new)
        mixed = self.attend(q.transpose(1, 2), kept, kept, scale=scale, causal=True, mask=mask)
        return torch.einsum("bnsc,nvc->bsnv", mixed[..., : self.latent], up_values)
