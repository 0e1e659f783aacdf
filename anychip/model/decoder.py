"""One decoder in plain PyTorch: pre-norm, rotary grouped-query attention, SwiGLU, untied head.

Parameters are fp32 masters; products run in the dtype of the activations, norms and softmax in fp32. Shapes in
comments: b batch, s sequence, h hidden, n query heads, k key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.cache import KeyValueCache
from anychip.model.remake import Remake, product
from anychip.model.rope import Rotary, rotary, rotary_at
from anychip.recipe.schema import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32 (arXiv 1910.07467), returned in x's dtype."""

    def __init__(self, size: int, eps: float, operators: Operators = reference) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.rms_norm = eps, operators.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight)

    def normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(x, weight, self.eps)


class Adapter(nn.Module):
    """scale * b a x beside a matrix, with a [rank, in] and b [out, rank]; see `lora`."""

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        return self.adapt(x, self.a, self.b, remake)

    def adapt(self, x: Tensor, a: Tensor, b: Tensor, remake: Remake | None = None) -> Tensor:
        return product(product(x, a, remake=remake), b) * self.scale


class Linear(nn.Module):
    """A product in the dtype of its input; `weight` [out, in] stays the fp32 master. What an `adapter` computes from
    the same input is added."""

    adapter: Adapter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter = None

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        out = product(x, self.weight, self.bias, remake)
        return out if self.adapter is None else out + self.adapter(x, remake)


class Attention(nn.Module):
    """`attend` mixes the values; who splits the sequence replaces it from outside."""

    def __init__(self, config: ModelConfig, layer: int, operators: Operators = reference) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotate, self.attend = operators.rotate, operators.attention
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=False)
        self.k_proj = Linear(config.hidden_size, keys, bias=False)
        self.v_proj = Linear(config.hidden_size, keys, bias=False)
        self.o_proj = Linear(queries, config.hidden_size, bias=True)

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
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.rotate(self.q_proj(x, remake).view(heads), cos, sin).transpose(1, 2)  # [b, n, s, d]
        k = self.rotate(self.k_proj(x, remake).view(heads), cos, sin).transpose(1, 2)  # [b, k, s, d]
        v = self.v_proj(x, remake).view(heads).transpose(1, 2)
        if cache is not None:  # new tokens see all cached ones and their own past
            k, v = cache.write(self.layer, k, v)
        mixed = self.attend(q, k, v, scale=scale, causal=True, mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, operators: Operators = reference) -> None:
        super().__init__()
        self.swiglu = operators.swiglu
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, *, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """keep: whether backward finds the SwiGLU, or computes it again from gate and up."""
        gate, up = self.gate_proj(x, remake), self.up_proj(x, remake)
        return self.down_proj(self.swiglu(gate, up), None if keep else Remake(lambda: self.swiglu(gate, up)))


class DecoderLayer(nn.Module):
    """`keep_cheap`: whether norms and SwiGLU are kept for backward, or computed again there."""

    def __init__(self, config: ModelConfig, layer: int, operators: Operators = reference) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.self_attn = Attention(config, layer, operators)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.mlp = MLP(config, operators)
        self.keep_cheap = True

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, scale: float, cache: KeyValueCache | None = None, mask: Any = None
    ) -> Tensor:
        normed, remake = self._normed(self.input_layernorm, x)
        x = x + self.self_attn(normed, cos, sin, scale, cache, mask, remake=remake)
        normed, remake = self._normed(self.post_attention_layernorm, x)
        return x + self.mlp(normed, remake=remake, keep=self.keep_cheap)

    def _normed(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, Remake | None]:
        return norm(x), None if self.keep_cheap else Remake(lambda: norm(x))


class Decoder(nn.Module):
    """A causal language model. Build it on the meta device to count, or fill it with `init_parameters`.

    `visible` says in the words of `Attention.attend` what documents let a token see; both are replaced together.
    """

    visible: Callable[[Tensor], Any]

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, operators: Operators = reference
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.visible = config, compute_dtype, same_document
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_empty_embedding(config))
        self.layers = nn.ModuleList(DecoderLayer(config, layer, operators) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """input_ids [b, s] int64 -> normed hidden states [b, s, h] in the compute dtype.

        With a cache, `input_ids` continue the cached tokens and are added to them. `positions` int64 [s] say where the
        tokens stand in a sequence of `length` tokens (default: the cached and these). `documents` int [b, s] keep
        attention inside tokens of the same number.
        """
        start = 0 if cache is None else cache.length
        end = start + input_ids.shape[1]
        if cache is not None:
            cache.extend(input_ids.shape[1])
        if positions is None:
            tables = rotary(self.config, start, end, length or end, input_ids.device)
        else:
            tables = rotary_at(self.config, positions, length or end)
        mask = None if documents is None else self.visible(documents)
        return self.norm(self.run_layers(self.embed(input_ids), tables, cache, mask))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [b, s] -> [b, s, h] in the compute dtype."""
        return self.embed_tokens(input_ids).to(self.compute_dtype)

    def run_layers(self, x: Tensor, tables: Rotary, cache: KeyValueCache | None = None, mask: Any = None) -> Tensor:
        """Hidden states [b, s, h] through all layers that are here; `mask` is what `visible` returned."""
        for layer in self.layers:
            x = layer(x, *tables, cache, mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., h] -> logits [..., vocab_size] in the compute dtype."""
        return self.lm_head(hidden)


def same_document(documents: Tensor) -> Tensor:
    """[b, s] int -> [b, 1, s, s] bool: True where two tokens are of one document."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def _empty_embedding(config: ModelConfig) -> Tensor:
    return torch.empty(config.vocab_size, config.hidden_size)
