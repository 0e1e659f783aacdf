"""Rotary positions (arXiv 2104.09864, rotate-half) with TeleChat2's dynamic NTK and attention scaling.

The published rule, for a sequence of length S, with d = head_dim:

    S' = max(S, training_length)
    alpha = max(1, 2 ** ceil(log2(S' / base_length) + 1) - 1)        1, 3, 7, ... as S' passes base_length, 2 x, 4 x
    base = rope_theta * alpha ** (d / (d - 2))
    mscale = 1 if S' == training_length else 0.1 * ln(S' / training_length) + 1      on cos and sin alike

A forward pass over a whole sequence uses one S for all its positions. Decoding does not: a token is read when the
sequence is as long as it was then, and attends to keys that were cached at smaller S. `rope_scaling.cached_keys` says
what it sees:

`rerotate`   Every token's scores are the rule's at its own S, against old keys as against new ones. mscale, which
             multiplies queries and keys alike and so scores by its square, is part of the softmax scale; when alpha
             steps the cache turns its keys by the difference of the two rotations. Angles in fp64, tables in fp32.
`published`  What the published code computes, number for number: mscale is multiplied into cos and sin, angles are
             fp32, tables are rounded to fp16, and a cached key keeps the alpha and the mscale of the S at which it
             was cached, so that scores mix several rules.

With `yarn` (arXiv 2309.00071) frequencies are the same at every length and scores are scaled by its mscale squared.

Up to training_length both equal a full forward pass, apart from rounding. Beyond, neither does to the last digit: the
states of earlier tokens were computed at their own S, and no cache revisits them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anychip.recipe.schema import ModelConfig, YarnScaling


@dataclass(frozen=True)
class RopeScale:
    """What the rule gives for one sequence length."""

    alpha: int
    mscale: float


class Rotary(NamedTuple):
    """What attention needs to know about positions: tables for its new tokens and the factor on all its scores."""

    cos: Tensor  # [tokens, rotary_dim / 2] fp32
    sin: Tensor  # [tokens, rotary_dim / 2] fp32
    score_scale: float


def rope_scale(config: ModelConfig, length: int) -> RopeScale:
    """alpha and mscale at this sequence length (tokens); (1, 1.0) for a model without scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        yarn = config.yarn
        return RopeScale(1, 1.0 if yarn is None else yarn.mscale * math.log(yarn.factor) + 1)
    length = max(length, scaling.training_length)
    alpha = max(1, 2 ** math.ceil(math.log2(length / scaling.base_length) + 1) - 1)
    beyond = length > scaling.training_length
    return RopeScale(alpha, 0.1 * math.log(length / scaling.training_length) + 1 if beyond else 1.0)


def keeps_published_hazard(config: ModelConfig) -> bool:
    """Whether cached keys stay as they were when the sequence outgrows them."""
    return config.rope_scaling is not None and config.rope_scaling.cached_keys == "published"


def rotary(config: ModelConfig, start: int, end: int, length: int, device: torch.device | str = "cpu") -> Rotary:
    """Tables and score scale for tokens `start` to `end` of a sequence whose S is `length`."""
    return rotary_at(config, torch.arange(start, end, device=device), length)


def rotary_at(config: ModelConfig, positions: Tensor, length: int) -> Rotary:
    """Tables and score scale for tokens at these positions, int64 [tokens], of a sequence whose S is `length`."""
    scale = rope_scale(config, length)
    plain = config.head_dim**-0.5
    if keeps_published_hazard(config):
        return Rotary(*_published_cos_sin(config, positions, scale), plain)
    return Rotary(*cos_sin(config, positions, scale.alpha), plain * scale.mscale**2)


class RotaryTable:
    """`rotary` for one model, with the tables of the last alpha kept: decoding asks for one more token each time."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._alpha = 0
        self._cos = self._sin = torch.empty(0)

    def rows(self, start: int, end: int, length: int) -> Rotary:
        """Equal to `rotary(config, start, end, length)`."""
        if keeps_published_hazard(self.config):
            return rotary(self.config, start, end, length, self.device)
        scale = rope_scale(self.config, length)
        if scale.alpha != self._alpha or end > len(self._cos):
            positions = torch.arange(max(end, min(2 * end, self.config.max_position_embeddings)), device=self.device)
            self._cos, self._sin = cos_sin(self.config, positions, scale.alpha)
            self._alpha = scale.alpha
        return Rotary(self._cos[start:end], self._sin[start:end], self.config.head_dim**-0.5 * scale.mscale**2)


def inverse_frequencies(config: ModelConfig, alpha: int) -> Tensor:
    """Angle per position, [rotary_dim / 2] fp64."""
    dim = config.rotary_dim
    frequencies = _base(config, alpha) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return frequencies if config.yarn is None else _stretched(frequencies, config.yarn, config.rope_theta)


def _stretched(frequencies: Tensor, yarn: YarnScaling, base: float) -> Tensor:
    """Frequencies that turn less than beta_slow times within the original context are divided by the factor, those
    above beta_fast stay, and between them a ramp leads from one to the other (section 3.2, eq. 18-23)."""
    dim = 2 * len(frequencies)

    def index_of(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(index_of(yarn.beta_fast)), 0), min(math.ceil(index_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / yarn.factor * stretched


def cos_sin(config: ModelConfig, positions: Tensor, alpha: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [len(positions), rotary_dim / 2] fp32 (angles in fp64, so that long positions keep their phase)."""
    angles = positions.to("cpu", torch.float64)[:, None] * inverse_frequencies(config, alpha)
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.to(positions.device), sin.to(positions.device)


def _base(config: ModelConfig, alpha: int) -> float:
    dim = config.rotary_dim
    return config.rope_theta * alpha ** (dim / (dim - 2)) if dim > 2 else config.rope_theta


def _published_cos_sin(config: ModelConfig, positions: Tensor, scale: RopeScale) -> tuple[Tensor, Tensor]:
    """fp32 angles; cos and sin rounded to fp16, multiplied by mscale, and rounded to fp16 again."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[:, None] * (1.0 / _base(config, scale.alpha) ** exponents)
    return (scale.mscale * angles.cos().half()).float(), (scale.mscale * angles.sin().half()).float()
