"""Rotary positions (arXiv 2104.09864, rotate-half) with TeleChat2's dynamic NTK and attention scaling.

The published rule, for a sequence of length S, with d = head_dim:

    S' = max(S, training_length)
    alpha = max(1, 2 ** ceil(log2(S' / base_length) + 1) - 1)        1, 3, 7, ... as S' passes base_length, 2 x, 4 x
    base = rope_theta * alpha ** (d / (d - 2))
    mscale = 1 if S' == training_length else 0.1 * ln(S' / training_length) + 1      on cos and sin alike

mscale multiplies queries and keys alike, hence scores by mscale ** 2: here it is part of the softmax scale, so cached
keys never depend on it. What remains in a cached key is alpha. When S passes a power of two, alpha steps up and keys
that were rotated with the old base no longer match a full forward pass. `rerotate` turns the cached keys by the
difference of the two rotations; `published` leaves them, and rounds cos and sin to fp16, as the published code does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.recipe.schema import ModelConfig


@dataclass(frozen=True)
class RopeScale:
    """What the rule gives for one sequence length."""

    alpha: int
    mscale: float


def rope_scale(config: ModelConfig, length: int) -> RopeScale:
    """alpha and mscale at this sequence length (tokens); (1, 1.0) for a model without scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return RopeScale(1, 1.0)
    length = max(length, scaling.training_length)
    alpha = max(1, 2 ** math.ceil(math.log2(length / scaling.base_length) + 1) - 1)
    beyond = length > scaling.training_length
    return RopeScale(alpha, 0.1 * math.log(length / scaling.training_length) + 1 if beyond else 1.0)


def inverse_frequencies(config: ModelConfig, alpha: int) -> Tensor:
    """Angle per position, [head_dim / 2] fp64."""
    dim = config.head_dim
    base = config.rope_theta * alpha ** (dim / (dim - 2)) if dim > 2 else config.rope_theta
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def cos_sin(config: ModelConfig, positions: Tensor, alpha: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [len(positions), head_dim / 2] fp32 (angles in fp64, so that long positions keep their phase)."""
    angles = positions.to("cpu", torch.float64)[:, None] * inverse_frequencies(config, alpha)
    cos, sin = angles.cos().float(), angles.sin().float()
    if config.rope_scaling is not None and config.rope_scaling.cached_keys == "published":
        cos, sin = cos.half().float(), sin.half().float()
    return cos.to(positions.device), sin.to(positions.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, seq, heads, head_dim] by cos/sin [seq, head_dim / 2]; keeps x's dtype, computes in fp32."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
