"""The decoder as a function of prepared weights: what `anychip chat` runs for every token.

It computes what `anychip.model.decoder.Decoder` computes, to rounding (a test compares them), with the work of one
token cut to few operations: query, key and value are one product, gate and up another; rotary tables are kept; the
query heads that share a key head attend as one small matrix, so keys and values are never repeated.

Tokens of several sequences share the products of one step. There is no padding: each sequence has its own cache and
attends alone, so sequences of any lengths, and prompts beside single tokens, go through one step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.model.cache import KeyValueCache
from anychip.model.decoder import Decoder, DecoderLayer
from anychip.model.rope import Rotary, RotaryTable
from anychip.serve.products import Precision, Product, choose_precision, make_product


@dataclass(frozen=True)
class LayerWeights:
    input_norm: Tensor
    qkv: Product
    o: Product
    post_attention_norm: Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class Piece:
    """The next `tokens` tokens of one sequence, whose earlier ones are in `cache`.

    `sequence_length` is the S of the rotary rule, where it is not the length after this piece: a prompt read in pieces
    has the same S in each, and so gives what it gives when read at once.
    """

    cache: KeyValueCache
    tokens: int
    sequence_length: int | None = None


class InferenceModel:
    """Prepared weights and a forward pass over pieces of sequences."""

    def __init__(self, decoder: Decoder, weights: torch.dtype, *, release: bool = False) -> None:
        """Prepare `decoder` with its matrices in `weights` (fp32 or bf16).

        `release` empties the decoder layer by layer, so that the model is in memory once and not twice.
        """
        self.config = decoder.config
        self.device = decoder.embed_tokens.weight.device
        self.precision = choose_precision(weights, self.device)
        self._rotary = RotaryTable(self.config, self.device)
        self._embedding = decoder.embed_tokens.weight.detach().to(weights)
        self._layers: list[LayerWeights] = []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            self._layers.append(_layer_weights(layer, self.precision))
            if release:
                layer.to("meta")
        self._norm = decoder.norm.weight.detach().to(self.precision.activations)
        self._head = make_product(decoder.lm_head.weight, None, self.precision)
        if release:
            decoder.to("meta")

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache for one sequence of at most `capacity` tokens."""
        return KeyValueCache(self.config, 1, capacity, self.precision.activations, self.device)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """input_ids [tokens] int64, the tokens of all pieces in a row -> fp32 logits [len(pieces), vocab_size] after
        the last token of each piece. Every cache grows by its piece."""
        spans = self._extend(pieces)
        cos, sin = _rotation(spans)
        x = F.embedding(input_ids, self._embedding).to(self.precision.activations)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x, layer.input_norm)).view(len(x), -1, self.config.head_dim)
            x = x + layer.o(self._attend(index, qkv, cos, sin, spans))
            gate, up = layer.gate_up(self._normed(x, layer.post_attention_norm)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        if len(spans) < len(x):
            x = x[[span.end - 1 for span in spans]]
        return self._head(self._normed(x, self._norm)).float()

    def _extend(self, pieces: Sequence[Piece]) -> list[_Span]:
        spans, end = [], 0
        for piece in pieces:
            before = piece.cache.length
            piece.cache.extend(piece.tokens, piece.sequence_length)
            after = piece.cache.length
            rotary = self._rotary.rows(before, after, piece.sequence_length or after)
            start, end = end, end + piece.tokens
            spans.append(_Span(piece.cache, start, end, rotary))
        return spans

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, spans: list[_Span]) -> Tensor:
        """qkv [tokens, n + 2k, d] -> mixed values [tokens, n * d]."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        turning = qkv.narrow(1, 0, heads + groups)
        turned = torch.addcmul(turning * cos, turning.roll(self.config.head_dim // 2, dims=-1), sin).to(qkv.dtype)
        parts = turned.narrow(1, 0, heads), turned.narrow(1, heads, groups), qkv.narrow(1, heads + groups, groups)
        if len(spans) == 1:
            return _attend_one(*parts, layer, spans[0])
        mixed = []
        for span in spans:
            q, k, v = (part[span.start : span.end] for part in parts)
            mixed.append(_attend_one(q, k, v, layer, span))
        return torch.cat(mixed)


@dataclass(frozen=True)
class _Span:
    """Rows `start` to `end` of a step belong to the sequence of `cache`, which already counts them."""

    cache: KeyValueCache
    start: int
    end: int
    rotary: Rotary


def _rotation(spans: list[_Span]) -> tuple[Tensor, Tensor]:
    """cos and signed sin for whole heads, [tokens, 1, d] fp32: turned = x * cos + roll(x, d / 2) * sin."""
    cos, sin = torch.cat([span.rotary.cos for span in spans]), torch.cat([span.rotary.sin for span in spans])
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, layer: int, span: _Span) -> Tensor:
    """Turned queries [s, n, d] and keys [s, k, d], values [s, k, d] of one sequence -> [s, n * d]."""
    tokens, heads, dim = q.shape
    groups, scale = k.shape[1], span.rotary.score_scale
    keys, values = span.cache.write(layer, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    if tokens == 1:  # the queries of one key head see the same keys: attend as if they were tokens
        q = q.view(1, groups, heads // groups, dim)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale).view(1, -1)
    q, past = q.transpose(0, 1)[None], span.cache.length - tokens
    mask = torch.ones(tokens, span.cache.length, dtype=torch.bool, device=q.device).tril(past) if past else None
    mixed = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=not past, scale=scale, enable_gqa=heads != groups
    )
    return mixed[0].transpose(0, 1).reshape(tokens, -1)


def _layer_weights(layer: DecoderLayer, precision: Precision) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach().to(precision.activations),
        qkv=make_product(qkv, None, precision),
        o=make_product(attention.o_proj.weight, attention.o_proj.bias, precision),
        post_attention_norm=layer.post_attention_layernorm.weight.detach().to(precision.activations),
        gate_up=make_product(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), None, precision),
        down=make_product(mlp.down_proj.weight, mlp.down_proj.bias, precision),
    )
