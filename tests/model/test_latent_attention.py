"""Latent attention: against its definition written out, and a cache of latents against the whole pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_models import LATENT, SIGMOID, random_decoder, some_tokens
from torch import Tensor

from anychip.model.arithmetic import kv_cache_bytes_per_token
from anychip.model.cache import KeyValueCache
from anychip.model.latent_attention import LatentAttention
from anychip.model.rope import rotary
from anychip.recipe.schema import ModelConfig


def written_out(attention: LatentAttention, config: ModelConfig, x: Tensor) -> Tensor:
    """One sequence [s, h], head by head (arXiv 2405.04434, eq. 37-47)."""
    rope, nope, value = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(
            [config.rope_theta ** (-2 * i / rope) for i in range(rope // 2)], dtype=torch.float64
        )
        pairs = torch.complex(x[:, : rope // 2], x[:, rope // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), 1)

    if config.q_lora_rank:
        queries = norm(x @ attention.q_a_proj.weight.T, attention.q_a_layernorm.weight) @ attention.q_b_proj.weight.T
    else:
        queries = x @ attention.q_proj.weight.T
    down = x @ attention.kv_a_proj_with_mqa.weight.T
    latent = norm(down[:, : config.kv_lora_rank], attention.kv_a_layernorm.weight)
    shared_key = turned(down[:, config.kv_lora_rank :])
    up = latent @ attention.kv_b_proj.weight.T
    heads = []
    for head in range(config.num_attention_heads):
        q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        kv = up[:, head * (nope + value) : (head + 1) * (nope + value)]
        scores = (q[:, :nope] @ kv[:, :nope].T + turned(q[:, nope:]) @ shared_key.T) / (nope + rope) ** 0.5
        future = torch.full_like(scores, -torch.inf).triu(1)
        heads.append(torch.softmax(scores + future, 1) @ kv[:, nope:])
    return torch.cat(heads, 1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0}], ids=["compressed queries", "plain queries"])
def test_it_computes_its_definition(changes: dict[str, Any]) -> None:
    config = ModelConfig(**{**LATENT, **changes})
    attention = random_decoder(config).layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    x = torch.randn(1, 11, config.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = attention(x, *rotary(config, 0, 11, 11), None, None)
    torch.testing.assert_close(found[0], written_out(attention, config, x[0]), rtol=1e-6, atol=1e-7)  # fp32 tables


@pytest.mark.parametrize("model", [LATENT, SIGMOID], ids=["dense", "experts"])
def test_a_cache_of_latents_gives_what_a_whole_pass_gives(model: dict[str, Any]) -> None:
    config = ModelConfig(**model)
    decoder, tokens = random_decoder(config), some_tokens(config, length=12)
    with torch.no_grad():
        whole = decoder(tokens)
        cache = KeyValueCache(config, 2, 12, torch.float64, torch.device("cpu"))
        pieces = [decoder(part, cache) for part in tokens.split((5, 1, 1, 5), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-11)


def test_the_cache_keeps_latents_only_also_when_it_grows() -> None:
    config = ModelConfig(**LATENT)
    decoder, tokens = random_decoder(config), some_tokens(config, length=12)
    cache = KeyValueCache(config, 2, 6, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        first = decoder(tokens[:, :6], cache)
        cache.grow(12)
        rest = decoder(tokens[:, 6:], cache)
        torch.testing.assert_close(torch.cat((first, rest), 1), decoder(tokens), rtol=1e-10, atol=1e-11)
    assert cache.keys is cache.values
    assert cache.keys.nbytes == 2 * 12 * kv_cache_bytes_per_token(config, 8)
