"""Attention of single new tokens to the caches of their sequences, on chips with a kernel of ours for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from anychip.chips.operators.cpu.library import RUNS_HERE
from anychip.chips.operators.override import is_right

_LARGEST_DIFFERENCE = 2e-2  # of the norm: probabilities and result are rounded to bf16, as everywhere
_LANES = 16


def attends_cached(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `cached_attention` works on this device for such heads: compiled, and tried against fp64 once."""
    suits = device.type == "cpu" and dtype == torch.bfloat16 and head_dim % _LANES == 0
    return suits and RUNS_HERE and _proved()


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, scale: float, out: Tensor
) -> None:
    """softmax(q k^T * scale) v of new tokens, each over its own sequence, where `attends_cached`.

    q [rows, n, d], k and v [rows, kv, d] are those of the new tokens; `tokens` int64 [t, 3] lists who attends: its row,
    its sequence, its position there. Keys and values are first written into the caches [sequences, kv, capacity, d];
    then each token attends to all up to its position, and its row of `out` [rows, n, d] is written. A row has the bits
    of `attention` over the whole sequence.
    """
    from anychip.chips.operators.cpu.cached_attention import cached_attention as kernel

    kernel(q, k, v, keys, values, tokens, scale, out)


@functools.cache
def _proved() -> bool:
    return is_right("attention to caches runs", _difference, _LARGEST_DIFFERENCE)


def _difference() -> float:
    """The largest over tokens of three sequences, one of which ends inside a block of keys and one inside a pair."""
    generator = torch.Generator().manual_seed(20_250_115)
    keys, values = (torch.randn(3, 2, 150, 32, generator=generator).bfloat16() for _ in range(2))
    q, k, v = (torch.randn(3, heads, 32, generator=generator).bfloat16() for heads in (6, 2, 2))
    tokens, out = torch.tensor([[0, 1, 128], [1, 2, 6], [2, 0, 140]]), torch.empty_like(q)
    cached_attention(q, k, v, keys, values, tokens, 0.2, out)
    largest = 0.0
    for row, sequence, position in tokens.tolist():
        seen, mixed = (x[sequence, :, : position + 1].double().repeat_interleave(3, 0) for x in (keys, values))
        scores = (seen @ q[row].double()[..., None]).squeeze(-1) * 0.2
        right = (scores.softmax(-1)[:, None] @ mixed).squeeze(1)
        new, kept = torch.stack((k[row], v[row])).double(), torch.stack((seen[::3, position], mixed[::3, position]))
        difference = ((out[row].double() - right).norm() / right.norm()).item()
        largest = max(largest, difference if torch.equal(new, kept) else float("inf"))
    return largest
