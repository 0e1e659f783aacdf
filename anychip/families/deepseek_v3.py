"""The layout of DeepSeek-V3 (arXiv 2412.19437), in which TeleChat3's models of experts are published. No tensors here.

Rows of a head that turn with position lie there in pairs (0 and 1, 2 and 3, ...), ours in halves. Modules for further
tokens stand behind the last layer and repeat embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from anychip.errors import InputError
from anychip.families.json_fields import Field, fields_of, model_of, number, rope_of
from anychip.families.llama import yarn_of
from anychip.families.published import PublishedTensor
from anychip.recipe.schema import ModelConfig

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
_FIELDS = (
    *(Field(name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    *(Field(name) for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")),
    *(Field(name) for name in ("v_head_dim", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")),
    *(Field(name, optional=True) for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")),
    *(Field(name, optional=True) for name in ("initializer_range", "routed_scaling_factor", "q_lora_rank")),
)


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """Every tensor in the order of the forward pass, those of one kind of all experts together."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield PublishedTensor("model.embed_tokens.weight", (vocab, hidden), ("embed_tokens.weight",))
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, f"model.layers.{layer}", f"layers.{layer}")
    yield PublishedTensor("model.norm.weight", (hidden,), ("norm.weight",))
    if not config.tie_word_embeddings:
        yield PublishedTensor("lm_head.weight", (vocab, hidden), ("lm_head.weight",))
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for depth in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + depth
        to, of = f"model.layers.{layer}", f"mtp.{depth}"
        yield PublishedTensor(f"{to}.embed_tokens.weight", (vocab, hidden), ("embed_tokens.weight",), repeats=True)
        yield PublishedTensor(f"{to}.enorm.weight", (hidden,), (f"{of}.enorm.weight",))
        yield PublishedTensor(f"{to}.hnorm.weight", (hidden,), (f"{of}.hnorm.weight",))
        yield PublishedTensor(f"{to}.eh_proj.weight", (hidden, 2 * hidden), (f"{of}.eh_proj.weight",))
        yield from _layer(config, layer, to, f"{of}.layer")
        yield PublishedTensor(f"{to}.shared_head.norm.weight", (hidden,), (f"{of}.norm.weight",))
        yield PublishedTensor(f"{to}.shared_head.head.weight", (vocab, hidden), (head,), repeats=True)


def _layer(config: ModelConfig, layer: int, to: str, of: str) -> Iterator[PublishedTensor]:
    hidden = config.hidden_size

    def plain(name: str, *shape: int, turned: tuple[int, int] | None = None) -> PublishedTensor:
        return PublishedTensor(f"{to}.{name}", shape, (f"{of}.{name}",), turned=turned)

    yield plain("input_layernorm.weight", hidden)
    yield from _attention(config, plain)
    yield plain("post_attention_layernorm.weight", hidden)
    if not config.has_experts(layer):
        yield from _mlp("mlp", hidden, config.intermediate_size, plain)
        return
    yield plain("mlp.gate.weight", config.n_routed_experts, hidden)
    yield plain("mlp.gate.e_score_correction_bias", config.n_routed_experts)
    for tensor in _mlp("mlp.experts", hidden, config.moe_intermediate_size, plain):
        kind = tensor.name.removeprefix(f"{to}.mlp.experts.")
        for expert in range(config.n_routed_experts):
            yield PublishedTensor(f"{to}.mlp.experts.{expert}.{kind}", tensor.shape, tensor.logical, expert)
    yield from _mlp("mlp.shared_experts", hidden, config.n_shared_experts * config.moe_intermediate_size, plain)


def _attention(config: ModelConfig, plain: Callable[..., PublishedTensor]) -> Iterator[PublishedTensor]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    turned = (nope + rope, nope)
    if config.q_lora_rank:
        yield plain("self_attn.q_a_proj.weight", config.q_lora_rank, hidden)
        yield plain("self_attn.q_a_layernorm.weight", config.q_lora_rank)
        yield plain("self_attn.q_b_proj.weight", heads * (nope + rope), config.q_lora_rank, turned=turned)
    else:
        yield plain("self_attn.q_proj.weight", heads * (nope + rope), hidden, turned=turned)
    yield plain("self_attn.kv_a_proj_with_mqa.weight", latent + rope, hidden, turned=(latent + rope, latent))
    yield plain("self_attn.kv_a_layernorm.weight", latent)
    yield plain("self_attn.kv_b_proj.weight", heads * (nope + value), latent)
    yield plain("self_attn.o_proj.weight", hidden, heads * value)


def _mlp(name: str, hidden: int, inner: int, plain: Callable[..., PublishedTensor]) -> Iterator[PublishedTensor]:
    yield plain(f"{name}.gate_proj.weight", inner, hidden)
    yield plain(f"{name}.up_proj.weight", inner, hidden)
    yield plain(f"{name}.down_proj.weight", hidden, inner)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what the model is. Raises InputError for a model that is none of these."""
    if (
        not config.latent
        or not config.n_routed_experts
        or not config.n_shared_experts
        or config.scoring_func != "sigmoid"
        or config.topk_method != "noaux_tc"
    ):
        raise InputError(
            "family telechat3-moe: DeepSeek-V3's layout is for latent attention, sigmoid scores ranked with a bias, "
            "and shared experts.",
            do="Set model.kv_lora_rank, n_routed_experts, n_shared_experts, scoring_func=sigmoid and "
            "topk_method=noaux_tc.",
        )
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "initializer_range"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "scoring_func"),
        *("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace", "topk_method"),
        *("norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "tie_word_embeddings"),
    )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in same},
        "q_lora_rank": config.q_lora_rank or None,
        "rope_scaling": _yarn(config),
        "rope_interleave": True,
        "n_group": 1,
        "topk_group": 1,
        "moe_layer_freq": 1,
        "aux_loss_alpha": config.router_aux_loss_coef,
        "seq_aux": True,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _yarn(config: ModelConfig) -> dict[str, Any] | None:
    """Scores of latent attention are scaled through mscale_all_dim, in tenths."""
    yarn = config.yarn
    if yarn is None:
        return None
    kept = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    scale = yarn.mscale * 10
    return {
        "rope_type": "yarn",
        **{name: getattr(yarn, name) for name in kept},
        "mscale": scale,
        "mscale_all_dim": scale,
    }


def config_from_json(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """A model from a published config.json. Raises InputError for what this decoder does not compute."""
    wanted = {
        "n_group": (1, None),
        "topk_group": (1, None),
        "moe_layer_freq": (1, None),
        "rope_interleave": (True, None),
        "attention_bias": (False, None),
        "hidden_act": ("silu", None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "quantization_config": (None,),
    }
    for name, allowed in wanted.items():
        if raw.get(name) not in allowed:
            raise InputError(f"has {name} {str(raw[name])[:40]}; only {allowed[0]} is computed.", where=where)
    fields = fields_of(raw, _FIELDS, where)
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        if raw.get(name):
            fields[name] = int(number(raw, name, where))
    theta, scaling = rope_of(raw, where)
    if theta is not None:
        fields["rope_theta"] = theta
    if scaling is not None:
        fields["yarn"] = yarn_of(scaling, where)
    fields |= {
        "family": "telechat3-moe",
        "biases": "none",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": bool(raw.get("norm_topk_prob", True)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }
    return model_of(fields, where)
