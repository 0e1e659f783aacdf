"""Attention of one step by kernels that give a token the bits of the training pass, whoever is beside it.

Pieces of prompts attend by training's own operator, which goes on from keys that are there already; single tokens, and
pieces too short for that operator's kernel, all together by the kernel for caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.chips.operators.cached import cached_attention
from anychip.chips.operators.contract import Attention
from anychip.model.cache import KeyValueCache
from anychip.serve.attention import Span
from anychip.serve.slots import Slot, Slots

_PIECE = 16  # tokens from which the operator has a kernel of its own


class RowAttention:
    """Who attends by what in one step; made once, used by every layer."""

    def __init__(self, spans: Sequence[Span], slots: Slots | None, operator: Attention) -> None:
        self._operator = operator
        self._pieces = [span for span in spans if span.end - span.start >= _PIECE]
        self._single: list[tuple[Slots | KeyValueCache, float, Tensor]] = []
        shared: dict[float, list[list[int]]] = {}
        for span in spans:
            if span.end - span.start >= _PIECE:
                continue
            if slots is not None and isinstance(span.cache, Slot):
                shared.setdefault(span.rotary.score_scale, []).extend(_tokens(span, span.cache.index))
            else:
                self._single.append((span.cache, span.rotary.score_scale, torch.tensor(_tokens(span, 0))))
        if slots is not None:
            self._single += [(slots, scale, torch.tensor(tokens)) for scale, tokens in shared.items()]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Turned queries [tokens, n, d], keys and values [tokens, k, d] -> mixed values [tokens, n * d]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for caches, scale, tokens in self._single:
            cached_attention(q, k, v, *caches.layer(layer), tokens, scale, out)
        for span in self._pieces:
            rows = slice(span.start, span.end)
            keys, values = span.cache.write(layer, k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None])
            queries = q[rows].transpose(0, 1)[None]
            mixed = self._operator(queries, keys, values, scale=span.rotary.score_scale, causal=True, mask=None)
            out[rows] = mixed[0].transpose(0, 1)
        return out.flatten(1)


def _tokens(span: Span, sequence: int) -> list[list[int]]:
    """Row, sequence and position of each token of a span."""
    before = span.cache.length - span.end
    return [[row, sequence, before + row] for row in range(span.start, span.end)]
