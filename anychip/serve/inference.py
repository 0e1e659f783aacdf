"""The decoder as a function of prepared weights: what `anychip chat` runs for every token.

It computes what `anychip.model.decoder.Decoder` computes, to rounding (a test compares them), with the work of one
token cut to few operations: query, key and value are one product, gate and up another; rotary tables are kept; the
query heads that share a key head attend as one small matrix, so keys and values are never repeated.

Tokens of several sequences share the products of one step. There is no padding: each sequence has its own cache and
attends alone, so sequences of any lengths, and prompts beside single tokens, go through one step together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.backend import detect_backend
from anychip.chips.operators import Operators, operators_for
from anychip.chips.operators.cached import attends_cached
from anychip.errors import InputError
from anychip.model.cache import KeyValueCache, kept_shape
from anychip.model.decoder import Decoder, DecoderLayer
from anychip.model.rope import RotaryTable
from anychip.recipe.schema import ModelConfig
from anychip.serve.attention import Attend, Span, StepAttention
from anychip.serve.feed_forward import feed_forward
from anychip.serve.latent import LatentWeights, latent_weights
from anychip.serve.parts import WHOLE, Part
from anychip.serve.products import Precision, Product, choose_precision, make_head, make_product
from anychip.serve.row_attention import RowAttention
from anychip.serve.slots import Slots

_INVARIANT_ROWS = 16  # rows of every product in the batch-invariant mode


@dataclass(frozen=True)
class LayerWeights:
    """`before` and `feed_forward` act on each token by itself; `latent` replaces attention over heads of keys."""

    input_norm: Tensor
    before: Product
    latent: LatentWeights | None
    o: Product
    post_attention_norm: Tensor
    feed_forward: Product


@dataclass(frozen=True)
class Piece:
    """The next `tokens` tokens of one sequence, whose earlier ones are in `cache`.

    `sequence_length` is the S of the rotary rule, where it is not the length after this piece: a prompt read in pieces
    has the same S in each, and so gives what it gives when read at once.
    """

    cache: KeyValueCache
    tokens: int
    sequence_length: int | None = None
    every: bool = False
    """Whether logits after each of its tokens are wanted, not only after the last."""


class InferenceModel:
    """Prepared weights and a forward pass over pieces of sequences."""

    def __init__(
        self,
        decoder: Decoder,
        weights: torch.dtype,
        *,
        release: bool = False,
        int8: bool = False,
        invariant: bool = False,
        part: Part = WHOLE,
    ) -> None:
        """Prepare `decoder` with its matrices in `weights` (fp32 or bf16).

        `release` empties the decoder layer by layer, so that the model is in memory once and not twice. `int8` keeps
        matrices in 8 bits with a scale a row. `invariant` gives every sequence the same bits whatever is beside it.
        `part` is what this process computes of each step.
        """
        self.config, self.part = decoder.config, part
        self._here = part.config(decoder.config)  # heads of this process
        if invariant and (decoder.config.latent or decoder.config.n_routed_experts):
            raise InputError(
                "the batch-invariant mode is not for experts and latent attention: their products depend on who is "
                "beside a sequence.",
                do="Serve this model without it.",
            )
        self.device = decoder.embed_tokens.weight.device
        self.precision = choose_precision(weights, self.device, int8=int8)
        self.invariant = invariant
        self._free_rows = self.precision.panels  # any rows may be multiplied together
        self._pairs = self.device.type == "cpu" and self.precision.activations == torch.bfloat16
        self._operators = operators_for(detect_backend().vendor)
        width = kept_shape(self._here, 0)[2]
        self._by_kernel = attends_cached(self.device, self.precision.activations, width)
        self._rotary = RotaryTable(self.config, self.device)
        self._embedding = decoder.embed_tokens.weight.detach().to(weights)
        self._layers: list[LayerWeights] = []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            self._layers.append(
                _layer_weights(layer, self.config, self.precision, self._operators, part, release=release)
            )
            if release:
                layer.to("meta")
        self._norm = decoder.norm.weight.detach().float()
        self._head = make_head(part.vocabulary(decoder.head_weight), self.precision)
        if release:
            decoder.to("meta")

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache for one sequence of at most `capacity` tokens."""
        return KeyValueCache(self._here, 1, capacity, self.precision.activations, self.device)

    def new_slots(self, count: int, context_length: int) -> Slots:
        """Caches of `count` sequences that attend together."""
        return self.part.new_slots(self._here, count, context_length, self.precision.activations, self.device)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, pieces: Sequence[Piece], slots: Slots | None = None) -> Tensor:
        """input_ids [tokens] int64, the tokens of all pieces in a row -> fp32 logits [rows, vocab_size]: after the last
        token of each piece, or after every token of a piece that wants `every`. Every cache grows by its piece.

        Pieces whose caches are in `slots` attend together where that is faster.
        """
        self.part.announce(input_ids, pieces)
        spans = self._extend(pieces)
        attention = (
            RowAttention(spans, slots, self._operators.attention) if self._by_kernel else StepAttention(spans, slots)
        )
        cos, sin = _rotation(spans)
        x = _scaled(F.embedding(input_ids, self._embedding).to(self.precision.activations), self.config.input_mult)
        for index, layer in enumerate(self._layers):
            qkv = self._by_rows(partial(self._before_attention, layer), x)
            if layer.latent is None:
                mixed = self._attend(index, qkv.view(len(x), -1, self.config.head_dim), cos, sin, attention)
            else:
                mixed = layer.latent.attend(index, qkv, cos, sin, attention)
            x = self._by_rows(partial(self._after_attention, layer), x, mixed)
        kept = [row for span, piece in zip(spans, pieces, strict=True) for row in _wanted(span, piece)]
        if len(kept) < len(x):
            x = x[kept]
        return self.part.join(self._by_rows(self._logits, x))

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(_scaled(self._normed(x, self._norm), self.config.logit_scale))

    def _before_attention(self, layer: LayerWeights, x: Tensor) -> Tensor:
        return layer.before(self._normed(x, layer.input_norm))

    def _after_attention(self, layer: LayerWeights, x: Tensor, mixed: Tensor) -> Tensor:
        """What a layer does to each token by itself, from its input and the mixed values."""
        x = x + self.part.sum(layer.o(mixed))
        return x + layer.feed_forward(self._normed(x, layer.post_attention_norm))

    def _by_rows(self, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """function(*given) for a function of each row by itself, in blocks of the sizes that this model allows.

        Products in panels give a row the same bits in any company. Others do not: one bf16 row is added up in another
        order than several. One row more costs nothing there and gives the bits of the training pass, and in the
        batch-invariant mode every block has the same number of rows.
        """
        if self._free_rows:
            return function(*given)
        rows = len(given[0])
        if self.invariant:
            missing = -rows % _INVARIANT_ROWS
            padded = (F.pad(x, (0, 0, 0, missing)).split(_INVARIANT_ROWS) for x in given)
            return torch.cat([function(*block) for block in zip(*padded, strict=True)])[:rows]
        if rows == 1 and self._pairs:
            return function(*(x.expand(2, -1) for x in given))[:1]
        return function(*given)

    def _extend(self, pieces: Sequence[Piece]) -> list[Span]:
        spans, end = [], 0
        for piece in pieces:
            before = piece.cache.length
            piece.cache.extend(piece.tokens, piece.sequence_length)
            after = piece.cache.length
            rotary = self._rotary.rows(before, after, piece.sequence_length or after)
            start, end = end, end + piece.tokens
            spans.append(Span(piece.cache, start, end, rotary))
        return spans

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._operators.rms_norm(x, weight, self.config.rms_norm_eps)

    def _attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, attention: Attend) -> Tensor:
        """qkv [tokens, n + 2k, d] -> mixed values [tokens, n * d]."""
        heads, groups = self._here.num_attention_heads, self._here.num_key_value_heads
        turning = qkv.narrow(1, 0, heads + groups)
        turned = torch.addcmul(turning * cos, turning.roll(self.config.head_dim // 2, dims=-1), sin).to(qkv.dtype)
        return attention(
            layer, turned.narrow(1, 0, heads), turned.narrow(1, heads, groups), qkv.narrow(1, heads + groups, groups)
        )


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x times a multiplier of muP, which most models do not have."""
    return x if factor == 1.0 else x * factor


def _wanted(span: Span, piece: Piece) -> range:
    return range(span.start if piece.every else span.end - 1, span.end)


def _rotation(spans: list[Span]) -> tuple[Tensor, Tensor]:
    """cos and signed sin for whole heads, [tokens, 1, d] fp32: turned = x * cos + roll(x, d / 2) * sin."""
    cos, sin = torch.cat([span.rotary.cos for span in spans]), torch.cat([span.rotary.sin for span in spans])
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _layer_weights(
    layer: DecoderLayer,
    config: ModelConfig,
    precision: Precision,
    operators: Operators,
    part: Part,
    *,
    release: bool,
) -> LayerWeights:
    attention: Any = layer.self_attn
    latent = latent_weights(attention, config, precision, operators.rms_norm, part) if config.latent else None
    if latent is None:
        qkv = [part.rows(linear.weight) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach().float(),
        before=latent.before if latent is not None else make_product(torch.cat(qkv), None, precision),
        latent=latent,
        o=make_product(part.columns(attention.o_proj.weight), part.once(attention.o_proj.bias), precision),
        post_attention_norm=layer.post_attention_layernorm.weight.detach().float(),
        feed_forward=feed_forward(layer, precision, operators, part, release=release),
    )
