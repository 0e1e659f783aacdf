"""A second, independent forward pass, straight on published tensors.

It shares no code with the decoder: keys and values are split as the published model splits them, rotation and its
scaling are written out, attention is a plain softmax, experts are run token by token. One layer's weights are in memory
at a time, so that even the 115B can be checked on a small machine. fp32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.families.layouts import Layout
from anychip.recipe.schema import ModelConfig

Read = Callable[[str], Tensor]
_VOCABULARY_ROWS = 16_384


@dataclass(frozen=True)
class _Names:
    """How a layout calls the same things."""

    embed: str
    layer: str
    attention: str
    out: str
    experts: str
    router: str
    halves: tuple[str, str, str]
    norm: str


_TELECHAT2 = _Names(
    embed="transformer.word_embeddings",
    layer="transformer.h.",
    attention="self_attention",
    out="dense",
    experts="mlp.local_experts",
    router="mlp.router",
    halves=("gate_proj", "up_proj", "down_proj"),
    norm="transformer.ln_f",
)
_LLAMA = _Names(
    embed="model.embed_tokens",
    layer="model.layers.",
    attention="self_attn",
    out="o_proj",
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.gate",
    halves=("w1", "w3", "w2"),
    norm="model.norm",
)
_DEEPSEEK = _Names(**{**vars(_LLAMA), "experts": "mlp.experts", "router": "mlp.gate", "halves": _TELECHAT2.halves})


def reference_logits(config: ModelConfig, read: Read, tokens: Tensor, layout: Layout = "family") -> Tensor:
    """Logits [len(tokens), vocab_size] fp32 of one sequence; `read` returns a published tensor by name."""
    length, plain = len(tokens), layout == "llama" or config.family == "llama"
    names = _LLAMA if plain else _names(config)
    future = torch.full((length, length), -math.inf).triu(1)
    state = read(f"{names.embed}.weight")[tokens].float() * (1.0 if plain else config.input_mult)
    for number in range(config.num_hidden_layers):
        at = f"{names.layer}{number}"
        normed = _norm(state, read(f"{at}.input_layernorm.weight"), config.rms_norm_eps)
        state = state + _attention(config, read, f"{at}.{names.attention}", names, normed, future)
        normed = _norm(state, read(f"{at}.post_attention_layernorm.weight"), config.rms_norm_eps)
        if config.n_routed_experts and number >= config.first_k_dense_replace:
            state = state + _experts(config, read, at, names, normed)
        else:
            state = state + _swiglu(read, f"{at}.mlp", _TELECHAT2.halves, normed)
    state = _norm(state, read(f"{names.norm}.weight"), config.rms_norm_eps)
    multiplied = plain and config.logit_scale != config.input_mult
    head = read("lm_head.weight" if not config.tie_word_embeddings or multiplied else f"{names.embed}.weight")
    rows = range(0, config.vocab_size, _VOCABULARY_ROWS)
    logits = torch.cat([state @ head[start : start + _VOCABULARY_ROWS].float().T for start in rows], dim=-1)
    return logits * (1.0 if plain else config.output_mult / config.mup_scale_factor)


def _names(config: ModelConfig) -> _Names:
    if config.family.startswith("telechat2"):
        return _TELECHAT2
    return _DEEPSEEK if config.family == "telechat3-moe" else _LLAMA


def _attention(config: ModelConfig, read: Read, at: str, names: _Names, x: Tensor, future: Tensor) -> Tensor:
    """Mixed and projected values, [length, hidden]."""
    make = _latent_heads if config.kv_lora_rank else _shared_heads
    query, key, value = make(config, read, at, names, x)  # [length, heads or groups, width] each
    length, heads, groups = len(x), query.shape[1], key.shape[1]
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = query[:, head] @ key[:, group].T / math.sqrt(query.shape[2]) + future
        outputs.append(torch.softmax(scores, dim=-1) @ value[:, group])
    return _linear(read, f"{at}.{names.out}", torch.cat(outputs, dim=-1).view(length, -1))


def _shared_heads(config: ModelConfig, read: Read, at: str, names: _Names, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length, groups = len(x), config.num_key_value_heads
    dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    if names is _TELECHAT2:
        query = _linear(read, f"{at}.query", x)
        mixed = _linear(read, f"{at}.key_value", x).view(length, groups, 2 * dim)
        key, value = mixed.split(dim, dim=-1)
    else:
        query = _linear(read, f"{at}.q_proj", x)
        key, value = (_linear(read, f"{at}.{name}_proj", x).view(length, groups, dim) for name in "kv")
    cos, sin = _rotation(config, length, dim)
    factor = _mscale(config, length)
    return _turn(query.view(length, -1, dim), cos, sin) * factor, _turn(key, cos, sin) * factor, value


def _latent_heads(config: ModelConfig, read: Read, at: str, names: _Names, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every head's own keys and values from the latent; turned rows lie in pairs."""
    length, heads = len(x), config.num_attention_heads
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank:
        low = _norm(_linear(read, f"{at}.q_a_proj", x), read(f"{at}.q_a_layernorm.weight"), config.rms_norm_eps)
        query = _linear(read, f"{at}.q_b_proj", low)
    else:
        query = _linear(read, f"{at}.q_proj", x)
    query = query.view(length, heads, nope + rope)
    low = _linear(read, f"{at}.kv_a_proj_with_mqa", x)
    latent = _norm(low[:, : config.kv_lora_rank], read(f"{at}.kv_a_layernorm.weight"), config.rms_norm_eps)
    both = _linear(read, f"{at}.kv_b_proj", latent).view(length, heads, -1)
    cos, sin = _rotation(config, length, rope)

    def turn(pairs: Tensor) -> Tensor:
        halves = torch.cat((pairs[..., 0::2], pairs[..., 1::2]), dim=-1)
        return _turn(halves, cos, sin)

    position = turn(low[:, None, config.kv_lora_rank :]).expand(length, heads, rope)
    query = torch.cat((query[..., :nope], turn(query[..., nope:])), dim=-1) * _mscale(config, length) ** 2
    return query, torch.cat((both[..., :nope], position), dim=-1), both[..., nope:]


def _experts(config: ModelConfig, read: Read, at: str, names: _Names, x: Tensor) -> Tensor:
    """Token by token; an expert's weights are read when the first token asks for it."""
    scores = x @ read(f"{at}.{names.router}.weight").float().T
    scores = torch.softmax(scores, -1) if config.scoring_func == "softmax" else 1 / (1 + torch.exp(-scores))
    ranked = scores
    if config.topk_method == "noaux_tc":
        ranked = scores + read(f"{at}.{names.router}.e_score_correction_bias").float()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, ranked.sort(dim=-1, descending=True).indices[:, : config.num_experts_per_tok], True)
    weights = torch.where(chosen, scores, 0.0)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(config.n_routed_experts):
        rows = chosen[:, expert].nonzero().squeeze(1)
        if len(rows):
            answer = _swiglu(read, f"{at}.{names.experts}.{expert}", names.halves, x[rows])
            out[rows] += answer * (weights[rows, expert, None] * config.routed_scaling_factor)
    if config.n_shared_experts:
        out = out + _swiglu(read, f"{at}.mlp.shared_experts", names.halves, x)
    return out


def _swiglu(read: Read, at: str, halves: tuple[str, str, str], x: Tensor) -> Tensor:
    gate, up = (_linear(read, f"{at}.{name}", x) for name in halves[:2])
    return _linear(read, f"{at}.{halves[2]}", gate / (1 + torch.exp(-gate)) * up)


def _linear(read: Read, name: str, x: Tensor) -> Tensor:
    """With a bias where there is one."""
    out = x @ read(f"{name}.weight").float().T
    try:
        return out + read(f"{name}.bias").float()
    except KeyError:
        return out


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotation(config: ModelConfig, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dim] by the published rules; their scale is `_mscale`."""
    base = config.rope_theta
    if config.rope_scaling is not None:
        reach = max(length, config.rope_scaling.training_length)
        steps = math.ceil(math.log2(reach / config.rope_scaling.base_length) + 1)
        base *= max(2.0**steps - 1, 1.0) ** (dim / (dim - 2)) if dim > 2 else 1.0
    rates = [base ** (-2 * pair / dim) for pair in range(dim // 2)]
    if (yarn := config.yarn) is not None:
        turns = [yarn.original_max_position_embeddings * rate / (2 * math.pi) for rate in rates]
        first = next((pair for pair in range(dim // 2) if turns[pair] < yarn.beta_fast), dim // 2)
        last = next((pair for pair in range(dim // 2) if turns[pair] <= yarn.beta_slow), dim // 2)
        rates = _yarn_rates(rates, yarn.factor, max(first - 1, 0), min(last, dim - 1))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64))
    angles = angles.repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _yarn_rates(rates: list[float], factor: float, low: int, high: int) -> list[float]:
    """Rates up to pair `low` stay, from `high` on they are divided, and between them a line leads over."""
    shares = [min(1.0, max(0.0, (pair - low) / max(high - low, 0.001))) for pair in range(len(rates))]
    return [rate * (1 - share) + rate / factor * share for rate, share in zip(rates, shares, strict=True)]


def _mscale(config: ModelConfig, length: int) -> float:
    if config.yarn is not None:
        return config.yarn.mscale * math.log(config.yarn.factor) + 1
    if config.rope_scaling is None or length <= config.rope_scaling.training_length:
        return 1.0
    return 0.1 * math.log(length / config.rope_scaling.training_length) + 1


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + dim/2) of x [length, heads, dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]
