"""Attention of one step: tokens of many sequences, each with its own cache.

Sequences that add one token and live in slots attend together, in one operation over the shared tensors; the rest,
pieces of prompts and sequences far longer than the others, attend one by one. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.model.cache import KeyValueCache
from anychip.model.rope import Rotary
from anychip.serve.slots import COLUMNS, Slot, Slots

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, turned queries [tokens, n, d], keys and values [tokens, k, d] -> mixed values [tokens, n * d]."""

_CALL_COLUMNS = 256  # what one more operation costs, in columns of attention: measured on a CPU of 2 cores


@dataclass(frozen=True)
class Span:
    """Rows `start` to `end` of a step belong to the sequence of `cache`, which already counts them."""

    cache: KeyValueCache
    start: int
    end: int
    rotary: Rotary
    mask: Tensor | None = None


@dataclass(frozen=True)
class Together:
    """Sequences that attend at once: rows of the step, their slots and positions, int64 [sequences].

    mask [slots, 1, 1, columns] covers slots `first` to the last one used; those between that have no row here see
    only their first column, and nobody looks at what they get.
    """

    slots: Slots
    rows: Tensor
    index: Tensor
    positions: Tensor
    first: int
    mask: Tensor
    scale: float

    @property
    def dense(self) -> bool:
        return len(self.rows) == len(self.mask)


class StepAttention:
    """Who attends with whom in one step; made once, used by every layer."""

    def __init__(self, spans: Sequence[Span], slots: Slots | None) -> None:
        alone = list(spans)
        self.together = None if slots is None else _gather(slots, spans)
        if self.together is not None:
            taken = set(self.together.rows.tolist())
            alone = [span for span in spans if span.end - span.start > 1 or span.start not in taken]
        self.alone = [_with_mask(span) for span in alone]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Turned queries [tokens, n, d], keys and values [tokens, k, d] -> mixed values [tokens, n * d]."""
        if self.together is None and len(self.alone) == 1 and self.alone[0].end == len(q):
            return attend_one(q, k, v, layer, self.alone[0])
        mixed = q.new_zeros(len(q), q.shape[1] * q.shape[2])
        if self.together is not None:
            _attend_together(q, k, v, layer, self.together, mixed)
        for span in self.alone:
            rows = slice(span.start, span.end)
            mixed[rows] = attend_one(q[rows], k[rows], v[rows], layer, span)
        return mixed


def attend_one(q: Tensor, k: Tensor, v: Tensor, layer: int, span: Span) -> Tensor:
    """Turned queries [s, n, d] and keys [s, k, d], values [s, k, d] of one sequence -> [s, n * d]."""
    tokens, heads, dim = q.shape
    groups, scale, mask = k.shape[1], span.rotary.score_scale, span.mask
    keys, values = span.cache.write(layer, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    if mask is not None and isinstance(span.cache, Slot):
        keys, values = span.cache.columns(layer, mask.shape[-1])
    if tokens == 1:  # the queries of one key head see the same keys: attend as if they were tokens
        q = q.view(1, groups, heads // groups, dim)
        mask = None if mask is None else mask.expand(heads // groups, -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale).view(1, -1)
    q = q.transpose(0, 1)[None]
    mixed = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != groups
    )
    return mixed[0].transpose(0, 1).reshape(tokens, -1)


def _with_mask(span: Span) -> Span:
    """mask [tokens, columns] bool: what each of its tokens may see. None where that is all, or plainly causal."""
    tokens, length, device = span.end - span.start, span.cache.length, span.rotary.cos.device
    columns = length
    if isinstance(span.cache, Slot):
        columns = min(-(-length // COLUMNS) * COLUMNS, span.cache.capacity)
    past = length - tokens
    if columns == length and (tokens == 1 or not past):
        return span
    mask = torch.ones(tokens, columns, dtype=torch.bool, device=device).tril(past)
    return Span(span.cache, span.start, span.end, span.rotary, mask)


def _gather(slots: Slots, spans: Sequence[Span]) -> Together | None:
    """The single tokens worth taking together: those whose sequences are at most as long as the cheapest limit."""
    single = [span for span in spans if span.end - span.start == 1 and isinstance(span.cache, Slot)]
    if len(single) < 2:
        return None
    scale = single[0].rotary.score_scale
    single = sorted((span for span in single if span.rotary.score_scale == scale), key=lambda span: span.cache.length)
    indices = [_index(span) for span in single]
    best, least = 0, sum(span.cache.length + _CALL_COLUMNS for span in single)
    rest = 0
    for count in range(len(single), 1, -1):  # the `count` shortest together, the rest alone
        extent = max(indices[:count]) - min(indices[:count]) + 1
        cost = extent * single[count - 1].cache.length + _CALL_COLUMNS + rest
        if cost < least:
            best, least = count, cost
        rest += single[count - 1].cache.length + _CALL_COLUMNS
    if best < 2:
        return None
    chosen = sorted(single[:best], key=_index)
    first, last = _index(chosen[0]), _index(chosen[-1])
    longest = max(span.cache.length for span in chosen)
    columns = min(-(-longest // COLUMNS) * COLUMNS, slots.capacity)
    lengths = torch.ones(last - first + 1, dtype=torch.int64)
    index = torch.tensor([_index(span) for span in chosen])
    lengths[index - first] = torch.tensor([span.cache.length for span in chosen])
    mask = (torch.arange(columns)[None] < lengths[:, None])[:, None, None].to(slots.device)
    rows = torch.tensor([span.start for span in chosen], device=slots.device)
    positions = (lengths[index - first] - 1).to(slots.device)
    return Together(slots, rows, index.to(slots.device), positions, first, mask, scale)


def _index(span: Span) -> int:
    assert isinstance(span.cache, Slot)
    return span.cache.index


def _attend_together(q: Tensor, k: Tensor, v: Tensor, layer: int, group: Together, mixed: Tensor) -> None:
    keys, values = group.slots.layers[layer]
    keys.transpose(1, 2)[group.index, group.positions] = k[group.rows]
    values.transpose(1, 2)[group.index, group.positions] = v[group.rows]
    heads, groups, dim = q.shape[1], k.shape[1], q.shape[2]
    extent, columns = group.mask.shape[0], group.mask.shape[-1]
    queries = q[group.rows].view(-1, groups, heads // groups, dim)
    if not group.dense:
        spread = queries.new_zeros(extent, *queries.shape[1:])
        queries = spread.index_copy_(0, group.index - group.first, queries)
    found = F.scaled_dot_product_attention(
        queries,
        keys.narrow(0, group.first, extent).narrow(2, 0, columns),
        values.narrow(0, group.first, extent).narrow(2, 0, columns),
        attn_mask=group.mask.expand(-1, -1, heads // groups, -1),
        scale=group.scale,
    )
    if not group.dense:
        found = found[group.index - group.first]
    mixed[group.rows] = found.reshape(-1, heads * dim)
