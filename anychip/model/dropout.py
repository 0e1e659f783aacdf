"""Dropout of residual branches whose mask depends on what a number is, never on where it is computed.

Whether a channel of a token is dropped is a hash of (seed, step, row of the global batch, position, layer, branch,
channel): a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So every
layout, every chip, a layer computed again and a run that goes on draw the same mask, and none is kept for backward,
which hashes again.

Words are 32 bits inside int64 and no product reaches 63: chips differ in what an overflow gives, and some lack uint.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x21F0AAAD  # odd, 31 bits: multipliers of xor-shift-multiply hashes with little bias
_BLOCK = 1 << 16  # elements hashed at a time on a CPU: what its caches hold


def token_keys(seed: int, step: int, rows: range, length: int) -> Tensor:
    """What all draws of a step about a token are made from: int64 [len(rows), length] on the CPU. `rows` are places in
    the global batch, positions count from 0."""
    low, high = _words("step", seed, step)
    row = torch.arange(rows.start, rows.stop)[:, None]
    position = torch.arange(length)
    return _key(_mix(_mix(row ^ low) ^ position), _mix(_mix(row ^ high) ^ position))


def layer_keys(keys: Tensor, layer: int) -> Tensor:
    """What a layer's draws are made from, of `token_keys`; same shape and device."""
    low, high = _words("layer", layer)
    return _key(_mix((keys & _WORD) ^ low), _mix((keys >> 32) ^ high))


def drop(x: Tensor, keys: Tensor, branch: int, rate: float) -> Tensor:
    """x [b, s, h] with the share `rate` (0 to 1) of its numbers set to zero, the others divided by 1 - rate. `keys`
    int64 [b, s] are the layer's; branches of a layer count from 0."""
    dropped: Tensor = _Drop.apply(x, keys, branch, rate)
    return dropped


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, branch: int, rate: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.branch, ctx.rate = branch, rate
        return _masked(x, keys, branch, rate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _masked(grad_outputs[0], keys, ctx.branch, ctx.rate), None, None, None


def _masked(x: Tensor, keys: Tensor, branch: int, rate: float) -> Tensor:
    threshold = round(rate * (_WORD + 1))
    scale = 1 / (1 - threshold / (_WORD + 1))
    channels = x.shape[-1]
    counters = torch.arange(branch * channels, (branch + 1) * channels, device=x.device)

    def part(numbers: Tensor, of: Tensor) -> Tensor:
        return (numbers * scale).masked_fill(_draws(of, counters) < threshold, 0.0)

    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return part(x, keys)
    tokens = max(1, _BLOCK // channels)
    pieces = zip(x.flatten(0, 1).split(tokens), keys.flatten().split(tokens), strict=True)
    return torch.cat([part(*piece) for piece in pieces]).view_as(x)


def _draws(keys: Tensor, counters: Tensor) -> Tensor:
    """Keys [...] and counters [h] -> numbers below 2**32, int64 [..., h]. The first half of a key is mixed with the
    counter, the second comes in half-way: tokens that agree in one of them have nothing in common."""
    low, high = (keys & _WORD)[..., None], (keys >> 32)[..., None]
    x = low ^ counters
    x ^= x >> 16
    x *= _FIRST
    x &= _WORD
    x ^= high
    x ^= x >> 15
    x *= _SECOND
    x &= _WORD
    return x


def _mix(x: Tensor) -> Tensor:
    """Words -> words, one to one."""
    x = ((x ^ (x >> 16)) * _FIRST) & _WORD
    x = ((x ^ (x >> 15)) * _SECOND) & _WORD
    return x ^ (x >> 16)


def _key(low: Tensor, high: Tensor) -> Tensor:
    """Two words as one number; of the second, 31 bits."""
    return ((high >> 1) << 32) | low


def _words(*what: object) -> tuple[int, int]:
    digest = hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
