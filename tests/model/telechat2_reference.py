"""TeleChat2's forward pass written out plainly in fp64 from its description, with nothing of the package's model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from anychip.recipe.schema import ModelConfig

# (position, S at which the token was read, S at which it is looked at) -> rotation angles and factor on cos and sin
Rule = Callable[[int, int, int], tuple[Tensor, Tensor]]


def angles_at(config: ModelConfig, position: int, length: int) -> tuple[Tensor, float]:
    """Angles [d / 2] and mscale of the published rule for a sequence of `length` tokens."""
    d, alpha, mscale = config.hidden_size // config.num_attention_heads, 1, 1.0
    if config.rope_scaling is not None:
        trained, base_length = config.rope_scaling.training_length, config.rope_scaling.base_length
        length = max(length, trained)
        alpha = max(1, 2 ** math.ceil(math.log(length / base_length, 2) + 1) - 1)
        mscale = 1.0 if length <= trained else 0.1 * math.log(length / trained) + 1
    base = config.rope_theta * alpha ** (d / (d - 2))
    return torch.tensor([position / base ** (2 * i / d) for i in range(d // 2)], dtype=torch.float64), mscale


def exact_rule(config: ModelConfig) -> Rule:
    """Every key is seen as the rule has it when it is looked at."""

    def rule(position: int, cached: int, seen: int) -> tuple[Tensor, Tensor]:
        angles, mscale = angles_at(config, position, seen)
        return angles.cos() * mscale, angles.sin() * mscale

    return rule


def published_rule(config: ModelConfig) -> Rule:
    """A key keeps the rotation and the mscale of the time when it was cached; tables are fp16."""

    def rule(position: int, cached: int, seen: int) -> tuple[Tensor, Tensor]:
        angles, mscale = angles_at(config, position, cached)
        cos, sin = angles.float().cos().half(), angles.float().sin().half()
        return (mscale * cos).double(), (mscale * sin).double()

    return rule


def forward(
    config: ModelConfig, weights: Mapping[str, Tensor], ids: list[int], read_at: list[int], rule: Rule
) -> Tensor:
    """Logits [len(ids), vocab_size] fp64. Token i was read when the sequence was `read_at[i]` tokens long."""
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    n, kv = config.num_attention_heads, config.num_key_value_heads
    d, count = config.hidden_size // n, len(ids)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x: Tensor, position: int, cached: int, seen: int) -> Tensor:
        cos, sin = rule(position, cached, seen)
        first, second = x[: d // 2], x[d // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin))

    x = w["embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        p = f"layers.{layer}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q = (h @ w[p + "self_attn.q_proj.weight"].T).view(count, n, d)
        k = (h @ w[p + "self_attn.k_proj.weight"].T).view(count, kv, d)
        v = (h @ w[p + "self_attn.v_proj.weight"].T).view(count, kv, d)
        mixed = torch.zeros(count, n, d, dtype=torch.float64)
        for i in range(count):
            for head in range(n):
                group = head // (n // kv)  # consecutive query heads share a key head
                query = turn(q[i, head], i, read_at[i], read_at[i])
                keys = torch.stack([turn(k[j, group], j, read_at[j], read_at[i]) for j in range(i + 1)])
                share = (keys @ query / math.sqrt(d)).softmax(0)
                mixed[i, head] = share @ v[: i + 1, group]
        attended = mixed.view(count, n * d) @ w[p + "self_attn.o_proj.weight"].T + w[p + "self_attn.o_proj.bias"]
        x = x + attended
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        swish = gate / (1 + (-gate).exp())
        x = x + (swish * up) @ w[p + "mlp.down_proj.weight"].T + w[p + "mlp.down_proj.bias"]
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T
