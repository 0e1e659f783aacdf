"""One decoder in plain PyTorch: pre-norm, rotary attention (grouped-query or latent), SwiGLU or experts.

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
from anychip.model.dropout import drop, layer_keys
from anychip.model.experts import MixtureOfExperts
from anychip.model.further import FurtherToken, following
from anychip.model.latent_attention import LatentAttention
from anychip.model.layers import MLP, Linear, RMSNorm
from anychip.model.remake import Remake, product
from anychip.model.rope import Rotary, rotary, rotary_at
from anychip.recipe.schema import ModelConfig


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
        self.o_proj = Linear(queries, config.hidden_size, bias=config.biases == "telechat2")

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


class DecoderLayer(nn.Module):
    """`number` counts from 0. `keep_cheap`: whether norms and SwiGLU are kept for backward, or computed again there."""

    def __init__(self, config: ModelConfig, layer: int, operators: Operators = reference) -> None:
        super().__init__()
        self.number, self.hidden_dropout = layer, config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.self_attn = (LatentAttention if config.latent else Attention)(config, layer, operators)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, operators)
        self.mlp = feed_forward(config, layer, operators)
        self.keep_cheap = True

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        cache: KeyValueCache | None = None,
        mask: Any = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """With `keys` (the layer's own, see `dropout`) a share of what each branch adds is dropped."""
        normed, remake = self._normed(self.input_layernorm, x)
        x = x + self._dropped(self.self_attn(normed, cos, sin, scale, cache, mask, remake=remake), keys, 0)
        normed, remake = self._normed(self.post_attention_layernorm, x)
        return x + self._dropped(self.mlp(normed, remake=remake, keep=self.keep_cheap), keys, 1)

    def _dropped(self, added: Tensor, keys: Tensor | None, branch: int) -> Tensor:
        return added if keys is None else drop(added, keys, branch, self.hidden_dropout)

    def _normed(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, Remake | None]:
        return norm(x), None if self.keep_cheap else Remake(lambda: norm(x))


def feed_forward(config: ModelConfig, layer: int, operators: Operators) -> nn.Module:
    """What a layer, counted from 0, does to each token by itself."""
    if config.has_experts(layer):
        return MixtureOfExperts(config, operators)
    return MLP(config.hidden_size, config.intermediate_size, config.biases == "telechat2", operators)


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
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.num_nextn_predict_layers:
            self.mtp = nn.ModuleList(
                FurtherToken(config, DecoderLayer(config, config.num_hidden_layers + depth, operators), operators)
                for depth in range(config.num_nextn_predict_layers)
            )

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix [vocab_size, h]; the embedding's where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        length: int | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """input_ids [b, s] int64 -> final hidden states [b, s, h] in the compute dtype, as the output head wants them.

        With a cache, `input_ids` continue the cached tokens and are added to them. `positions` int64 [s] say where the
        tokens stand in a sequence of `length` tokens (default: the cached and these). `documents` int [b, s] keep
        attention inside tokens of the same number. `keys` int64 [b, s], `token_keys` of these tokens, draw dropout.
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
        return self.final(self.run_layers(self.embed(input_ids), tables, cache, mask, keys))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [b, s] -> [b, s, h] in the compute dtype."""
        found = self.embed_tokens(input_ids).to(self.compute_dtype)
        return found if self.config.input_mult == 1.0 else found * self.config.input_mult

    def run_layers(
        self,
        x: Tensor,
        tables: Rotary,
        cache: KeyValueCache | None = None,
        mask: Any = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [b, s, h] through all layers that are here; `mask` is what `visible` returned, `keys` are of
        the tokens whose states these are."""
        layer: Any
        for layer in self.layers:
            x = layer(x, *tables, cache, mask, None if keys is None else layer_keys(keys, layer.number))
        return x

    def final(self, x: Tensor) -> Tensor:
        """What the last layer gives, normed, and scaled where logits are (muP)."""
        normed = self.norm(x)
        return normed if self.config.logit_scale == 1.0 else normed * self.config.logit_scale

    def further(
        self, hidden: Tensor, input_ids: Tensor, documents: Tensor | None = None, keys: Tensor | None = None
    ) -> list[Tensor]:
        """Final hidden states [b, s, h] and the tokens [b, s] they are of -> hidden states for each further token: the
        first predict the token after the next, and so on. The last ones of a sequence know too few tokens."""
        length = input_ids.shape[1]
        tables = rotary(self.config, 0, length, length, input_ids.device)
        mask = None if documents is None else self.visible(documents)
        states = []
        module: Any
        for depth, module in enumerate(self.mtp, start=1):
            own = None if keys is None else layer_keys(keys, module.layer.number)
            hidden = module(hidden, self.embed(following(input_ids, depth)), *tables, mask, own)
            states.append(hidden)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., h] -> logits [..., vocab_size] in the compute dtype."""
        return product(hidden, self.head_weight)


def further_modules(model: Decoder) -> list[FurtherToken]:
    """The modules that predict further tokens; most models have none."""
    return list(getattr(model, "mtp", ()))


def same_document(documents: Tensor) -> Tensor:
    """[b, s] int -> [b, 1, s, s] bool: True where two tokens are of one document."""
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def _empty_embedding(config: ModelConfig) -> Tensor:
    return torch.empty(config.vocab_size, config.hidden_size)
