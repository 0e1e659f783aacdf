"""MindFormers YAML: `model.model_config`, `parallel_config`, `runner_config`."""

from __future__ import annotations

from typing import Any

from anychip.errors import InputError
from anychip.plan.importers.found import Found, real_number, whole_number
from anychip.plan.importers.mindformers_layout import note_what_is_left, parallel_of, recompute_of, section
from anychip.plan.importers.parts import experts, latent_attention, without_biases


def from_yaml(raw: dict[str, Any], name: str) -> Found:
    """Raises InputError for models that recipes cannot describe."""
    found = Found(name)
    model = section(section(raw, "model"), "model_config")
    parallel, runner = section(raw, "parallel_config"), section(raw, "runner_config")

    def number(section: dict[str, Any], key: str) -> int | None:
        return whole_number(section.get(key), key)

    hidden, heads = number(model, "hidden_size"), number(model, "num_heads")
    found.model = {
        "vocab_size": number(model, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": number(model, "intermediate_size") or _derived_ffn(model, hidden),
        "num_hidden_layers": number(model, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(model, "n_kv_heads"),
        "rms_norm_eps": real_number(model.get("rms_norm_eps"), "rms_norm_eps"),
        "rope_theta": real_number(model.get("theta"), "theta"),
        "max_position_embeddings": number(model, "max_position_embedding") or number(model, "max_position_embeddings"),
        "num_nextn_predict_layers": number(model, "mtp_depth"),
        "mtp_loss_scaling_factor": real_number(model.get("mtp_loss_factor"), "mtp_loss_factor"),
        **_latent(model, heads),
        **_experts(found, section(raw, "moe_config")),
        **_yarn(model),
    }
    if "kv_lora_rank" in found.model or "n_routed_experts" in found.model:
        found.model |= without_biases(found.model)
    data, micro_batches = number(parallel, "data_parallel") or 1, number(parallel, "micro_batch_num") or 1
    rows = number(runner, "batch_size") or 1
    stages = number(parallel, "pipeline_stage") or 1
    for key, degree in (("data_parallel", data), ("pipeline_stage", stages), ("batch_size", rows)):
        if degree < 1:
            raise InputError(f"{key} is {degree}.", do="Give a number from 1 on.")
    found.training = {
        "seq_length": number(model, "seq_length"),
        "micro_batch_size": rows,
        "global_batch_size": rows * data * (micro_batches if stages > 1 else 1),
        "recompute": recompute_of(found, raw, found.model["num_hidden_layers"], stages),
    }
    found.parallel = parallel_of(found, raw, stages, data)
    rate = section(raw, "lr_schedule").get("learning_rate")
    decay = section(raw, "optimizer").get("weight_decay")
    found.optimizer = {
        "lr": real_number(rate, "lr_schedule.learning_rate"),
        "weight_decay": real_number(decay, "optimizer.weight_decay"),
    }
    note_what_is_left(found, raw)
    return found


def _latent(model: dict[str, Any], heads: int | None) -> dict[str, Any]:
    """Fields of `model`; none for plain attention."""

    def number(key: str) -> int | None:
        return whole_number(model.get(key), key)

    rank = number("kv_lora_rank")
    if not rank:
        return {}
    return latent_attention(
        heads=heads,
        q_rank=number("q_lora_rank"),
        kv_rank=rank,
        nope=number("qk_nope_head_dim"),
        rope=number("qk_rope_head_dim"),
        value=number("v_head_dim"),
    )


def _experts(found: Found, moe: dict[str, Any]) -> dict[str, Any]:
    """Fields of `model` from `moe_config`; none for a dense model."""

    def number(key: str) -> int | None:
        return whole_number(moe.get(key), f"moe_config.{key}")

    def real(key: str) -> float | None:
        return real_number(moe.get(key), f"moe_config.{key}")

    count, inner, first = number("expert_num"), number("moe_intermediate_size"), moe.get("first_k_dense_replace")
    if not count or count == 1:
        return {}
    losses = moe.get("aux_loss_factors")
    by_expert = losses[0] if isinstance(losses, list) and losses else None
    return experts(
        found,
        count=count,
        chosen=number("num_experts_chosen"),
        inner=inner,
        shared_inner=(number("shared_expert_num") or 0) * (inner or 0),
        dense_first=0 if isinstance(first, bool) else number("first_k_dense_replace") or 0,
        sigmoid=moe.get("use_gating_sigmoid") is True,
        ranking_bias=moe.get("balance_via_topk_bias") is True,
        renormalised=moe.get("norm_topk_prob", True) is True,
        scaling=real("routed_scaling_factor"),
        balance_loss=real_number(by_expert, "moe_config.aux_loss_factors"),
        z_loss=real("z_loss_factor"),
        capacity=None if moe.get("use_gmm") is True else real("capacity_factor"),
        groups=number("n_group"),
    )


def _yarn(model: dict[str, Any]) -> dict[str, Any]:
    """The field `yarn` of `model`."""
    scaling = section(model, "scaling_factor")
    factor = real_number(scaling.get("factor"), "scaling_factor.factor")
    original = whole_number(scaling.get("original_max_position_embeddings"), "original_max_position_embeddings")
    if str(model.get("extend_method", "")).upper() != "YARN" or not factor or not original:
        return {}
    values = {
        "beta_fast": real_number(scaling.get("beta_fast"), "beta_fast"),
        "beta_slow": real_number(scaling.get("beta_slow"), "beta_slow"),
    }
    scale = real_number(scaling.get("mscale_all_dim"), "mscale_all_dim")
    values["mscale"] = None if scale is None else 0.1 * scale
    given = {name: value for name, value in values.items() if value is not None}
    return {"yarn": {"factor": factor, "original_max_position_embeddings": original, **given}}


def _derived_ffn(model: dict[str, Any], hidden: int | None) -> int | None:
    """Llama's rule: two thirds of four times the width, scaled, rounded up to a multiple."""
    if hidden is None:
        return None
    scale = real_number(model.get("ffn_dim_multiplier"), "ffn_dim_multiplier") or 1.0
    unit = whole_number(model.get("multiple_of"), "multiple_of") or 256
    return -(-int(scale * int(8 * hidden / 3)) // unit) * unit
