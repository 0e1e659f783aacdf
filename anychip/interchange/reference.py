"""A second, independent forward pass, straight on published tensors.

It shares no code with the decoder: keys and values are split as the published model splits them, rotation and its
scaling are written out, attention is a plain softmax. One layer's weights are in memory at a time, so that even the
115B can be checked on a small machine. fp32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from anychip.recipe.schema import ModelConfig

Read = Callable[[str], Tensor]
_VOCABULARY_ROWS = 16_384


def reference_logits(config: ModelConfig, read: Read, tokens: Tensor) -> Tensor:
    """Logits [len(tokens), vocab_size] fp32 of one sequence; `read` returns a published tensor by name."""
    length, heads, groups, dim = (
        len(tokens),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    cos, sin = _rotation(config, length, dim)
    future = torch.full((length, length), -math.inf).triu(1)
    state = read("transformer.word_embeddings.weight")[tokens].float()
    for number in range(config.num_hidden_layers):
        at = f"transformer.h.{number}"
        normed = _norm(state, read(f"{at}.input_layernorm.weight"), config.rms_norm_eps)
        query = (normed @ _wide(read, f"{at}.self_attention.query.weight").T).view(length, heads, dim)
        mixed = (normed @ _wide(read, f"{at}.self_attention.key_value.weight").T).view(length, groups, 2 * dim)
        key, value = mixed.split(dim, dim=-1)
        query, key = _turn(query, cos, sin), _turn(key, cos, sin)
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = query[:, head] @ key[:, group].T / math.sqrt(dim) + future
            outputs.append(torch.softmax(scores, dim=-1) @ value[:, group])
        dense = _wide(read, f"{at}.self_attention.dense.weight"), _wide(read, f"{at}.self_attention.dense.bias")
        state = state + torch.cat(outputs, dim=-1) @ dense[0].T + dense[1]
        normed = _norm(state, read(f"{at}.post_attention_layernorm.weight"), config.rms_norm_eps)
        gate = normed @ _wide(read, f"{at}.mlp.gate_proj.weight").T
        up = normed @ _wide(read, f"{at}.mlp.up_proj.weight").T
        down = _wide(read, f"{at}.mlp.down_proj.weight"), _wide(read, f"{at}.mlp.down_proj.bias")
        state = state + (gate / (1 + torch.exp(-gate)) * up) @ down[0].T + down[1]
    state = _norm(state, read("transformer.ln_f.weight"), config.rms_norm_eps)
    head_weight = read("lm_head.weight")
    rows = range(0, config.vocab_size, _VOCABULARY_ROWS)
    return torch.cat([state @ head_weight[start : start + _VOCABULARY_ROWS].float().T for start in rows], dim=-1)


def _wide(read: Read, name: str) -> Tensor:
    return read(name).float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotation(config: ModelConfig, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim], attention scaling included, by the published rule."""
    base, factor = config.rope_theta, 1.0
    if config.rope_scaling is not None:
        reach = max(length, config.rope_scaling.training_length)
        steps = math.ceil(math.log2(reach / config.rope_scaling.base_length) + 1)
        base *= max(2.0**steps - 1, 1.0) ** (dim / (dim - 2)) if dim > 2 else 1.0
        if reach > config.rope_scaling.training_length:
            factor = 0.1 * math.log(reach / config.rope_scaling.training_length) + 1
    rates = torch.tensor([base ** (-2 * pair / dim) for pair in range(dim // 2)], dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).repeat(1, 2)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + dim/2) of x [length, heads, dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]
