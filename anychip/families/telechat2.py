"""TeleChat2 as published: tensor names and config.json; chat templates are in `templates`. No tensors here.

Layout of a published checkpoint (115B has 96 x 10 + 3 = 963 tensors): see `published_tensors`. Keys and values share
one matrix, interleaved per key/value head: rows [i * 2d, i * 2d + d) are the keys of head i, the next d its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anychip.errors import InputError
from anychip.families.json_fields import LARGEST as _LARGEST
from anychip.families.json_fields import MOST_LAYERS as _MOST_LAYERS
from anychip.families.json_fields import number
from anychip.families.json_fields import shown as _shown
from anychip.families.published import PublishedTensor
from anychip.families.templates import prompt_parts as prompt_parts
from anychip.recipe.schema import ModelConfig

ARCHITECTURES = ("TeleChat2ForCausalLM", "TeleChatForCausalLM", "TelechatForCausalLM")
MODEL_TYPE = "telechat"


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """Every published tensor of this configuration, in the order of the forward pass; shapes are [out, in]."""
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield PublishedTensor("transformer.word_embeddings.weight", (config.vocab_size, hidden), ("embed_tokens.weight",))
    for layer in range(config.num_hidden_layers):
        to, of = f"transformer.h.{layer}", f"layers.{layer}"
        kv = (f"{of}.self_attn.k_proj.weight", f"{of}.self_attn.v_proj.weight")
        yield PublishedTensor(f"{to}.input_layernorm.weight", (hidden,), (f"{of}.input_layernorm.weight",))
        yield PublishedTensor(
            f"{to}.self_attention.query.weight", (queries, hidden), (f"{of}.self_attn.q_proj.weight",)
        )
        yield PublishedTensor(f"{to}.self_attention.key_value.weight", (2 * keys, hidden), kv)
        yield PublishedTensor(
            f"{to}.self_attention.dense.weight", (hidden, queries), (f"{of}.self_attn.o_proj.weight",)
        )
        yield PublishedTensor(f"{to}.self_attention.dense.bias", (hidden,), (f"{of}.self_attn.o_proj.bias",))
        yield PublishedTensor(
            f"{to}.post_attention_layernorm.weight", (hidden,), (f"{of}.post_attention_layernorm.weight",)
        )
        if config.has_experts(layer):
            yield from _experts(config, to, of)
            continue
        yield PublishedTensor(f"{to}.mlp.gate_proj.weight", (ffn, hidden), (f"{of}.mlp.gate_proj.weight",))
        yield PublishedTensor(f"{to}.mlp.up_proj.weight", (ffn, hidden), (f"{of}.mlp.up_proj.weight",))
        yield PublishedTensor(f"{to}.mlp.down_proj.weight", (hidden, ffn), (f"{of}.mlp.down_proj.weight",))
        yield PublishedTensor(f"{to}.mlp.down_proj.bias", (hidden,), (f"{of}.mlp.down_proj.bias",))
    yield PublishedTensor("transformer.ln_f.weight", (hidden,), ("norm.weight",))
    yield PublishedTensor("lm_head.weight", (config.vocab_size, hidden), ("lm_head.weight",))


def _experts(config: ModelConfig, to: str, of: str) -> Iterator[PublishedTensor]:
    """A router, and each expert by itself; those of one kind of all experts together."""
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield PublishedTensor(f"{to}.mlp.router.weight", (count, hidden), (f"{of}.mlp.gate.weight",))
    for name, shape in (
        ("gate_proj.weight", (inner, hidden)),
        ("up_proj.weight", (inner, hidden)),
        ("down_proj.weight", (hidden, inner)),
        ("down_proj.bias", (hidden,)),
    ):
        for expert in range(count):
            yield PublishedTensor(
                f"{to}.mlp.local_experts.{expert}.{name}", shape, (f"{of}.mlp.experts.{name}",), expert
            )


# Buffers that old checkpoints carry and nobody needs.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".self_attention.bias")


def config_to_json(config: ModelConfig, dtype: str, bos: int | None, eos: int, pad: int | None) -> dict[str, Any]:
    """The published config.json of a model; `dtype` is torch's name, such as bfloat16.

    Runtimes take absent lengths for 8192 and scale beyond, so a model without scaling names its whole context.
    """
    scaling = config.rope_scaling
    base_length = scaling.base_length if scaling else config.max_position_embeddings
    training_length = scaling.training_length if scaling else config.max_position_embeddings
    experts = {}
    if config.n_routed_experts:
        _check_experts(config)
        experts = {"norm_topk_prob": config.norm_topk_prob, "router_aux_loss_coef": config.router_aux_loss_coef}
        experts |= {name: getattr(config, name) for name in _EXPERTS}
    return {
        **experts,
        "architectures": [ARCHITECTURES[0]],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "base_seqlen": base_length,
        "training_seqlen": training_length,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
    }


_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")  # no config.json of one is public


def _check_experts(config: ModelConfig) -> None:
    other = config.scoring_func != "softmax" or config.topk_method != "greedy" or config.routed_scaling_factor != 1.0
    if other or config.n_shared_experts or config.first_k_dense_replace:
        raise InputError(
            f"family {config.family}: experts are chosen by softmax scores alone, in every layer, and none is shared.",
            do="Set model.scoring_func=softmax, topk_method=greedy, n_shared_experts=0 and first_k_dense_replace=0.",
        )


# Published name first, then the Llama-like one that some copies use.
_FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_hidden_size", "intermediate_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "rms_norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "rope_theta": ("rope_theta",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length", "training_seqlen"),
    "initializer_range": ("initializer_range",),
}
_OPTIONAL = {"num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "initializer_range"}
_REFUSED_IF_TRUE = ("apply_residual_connection_post_layernorm", "embed_layernorm", "tie_word_embeddings")
_OTHER_EXPERT_FIELDS = ("num_experts", "num_local_experts", "moe_config")


def config_from_json(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """A ModelConfig from a published config.json, and warnings about values that are probably wrong in it.

    Raises InputError for another architecture and for settings that this decoder does not compute.
    """
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if names and not any(name in ARCHITECTURES for name in names):
        raise InputError(f"is a {_shown(names[0])}, not one of {', '.join(ARCHITECTURES)}.", where=where)
    if not raw.get("n_routed_experts") and any(raw.get(name) for name in _OTHER_EXPERT_FIELDS):
        raise InputError(
            f"describes a mixture of experts in fields that are not known; this family's are {', '.join(_EXPERTS)}.",
            where=where,
        )
    for flag in _REFUSED_IF_TRUE:
        if raw.get(flag):
            raise InputError(f"sets {flag}, which no published TeleChat2 model does.", where=where)
    fields: dict[str, Any] = {"family": "telechat2"}
    for field, aliases in _FIELDS.items():
        value = next((raw[alias] for alias in aliases if raw.get(alias) is not None), None)
        if value is None:
            if field not in _OPTIONAL:
                raise InputError(f"lacks {aliases[0]}.", where=where, do="Give a complete config.json.")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
            raise InputError(f"has {aliases[0]} {_shown(value)}, which is not a positive number.", where=where)
        fields[field] = value
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if fields["num_hidden_layers"] > _MOST_LAYERS:
        raise InputError(f"has {fields['num_hidden_layers']} layers; {_MOST_LAYERS:,} is the limit.", where=where)
    if fields.get("rope_theta", 1) < 1:
        raise InputError(f"has rope_theta {fields['rope_theta']}, which is below 1.", where=where)
    fields["rope_scaling"] = _rope_scaling(raw, where)
    if raw.get("n_routed_experts"):
        fields |= {name: int(number(raw, name, where)) for name in _EXPERTS}
        fields |= {"family": "telechat2-moe", "norm_topk_prob": bool(raw.get("norm_topk_prob", True))}
        if raw.get("router_aux_loss_coef"):
            fields["router_aux_loss_coef"] = float(number(raw, "router_aux_loss_coef", where))
    from pydantic import ValidationError

    try:
        config = ModelConfig(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"does not describe a model: {problem['msg']}.", where=where) from None
    warnings = []
    if config.rms_norm_eps < 1e-6:
        warnings.append(
            f"{where}: layer_norm_epsilon is {config.rms_norm_eps:g}; later releases of the same weights say 1e-05. "
            "The file's value is used."
        )
    return config, warnings


def _rope_scaling(raw: Mapping[str, Any], where: str) -> dict[str, int] | None:
    scaling = raw.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else scaling
        factor = scaling.get("factor", 1.0) if isinstance(scaling, Mapping) else None
        if kind != "dynamic" or factor != 1.0:
            raise InputError(
                f"has rope_scaling {_shown(scaling)}; only the published dynamic rule with factor 1.0 is computed.",
                where=where,
            )
    base, training = raw.get("base_seqlen"), raw.get("training_seqlen")
    if base is None and training is None:
        return None
    return {
        "base_length": _length("base_seqlen", training if base is None else base, where),
        "training_length": _length("training_seqlen", base if training is None else training, where),
    }


def _length(name: str, value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise InputError(f"has {name} {_shown(value)}, which is not a positive number of tokens.", where=where)
    return value


def same_scaling(one: ModelConfig, other: ModelConfig, length: int) -> bool:
    """Whether both rotate positions alike in sequences of up to `length` tokens.

    A model without scaling is published with its context as both lengths, which is no scaling within that context.
    How a cache treats old keys is a choice of who runs the model, and not compared.
    """
    return _scaling_within(one, length) == _scaling_within(other, length)


def _scaling_within(config: ModelConfig, length: int) -> tuple[int, int] | None:
    scaling = config.rope_scaling
    if scaling is None or length <= scaling.training_length <= scaling.base_length:
        return None
    return scaling.base_length, scaling.training_length
