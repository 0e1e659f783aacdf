"""MindFormers YAML: `model.model_config`, `parallel_config`, `runner_config`."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found, real_number, whole_number


def from_yaml(raw: dict[str, Any], name: str) -> Found:
    """Raises InputError for models that recipes cannot describe."""
    found = Found(name)
    model = _section(_section(raw, "model"), "model_config")
    parallel, runner = _section(raw, "parallel_config"), _section(raw, "runner_config")
    if model.get("kv_lora_rank"):
        found.refuse("latent attention")
    experts = _section(raw, "moe_config").get("expert_num", 1)
    if whole_number(experts, "moe_config.expert_num") not in (None, 0, 1):
        found.refuse("a mixture of experts")

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
        "max_position_embeddings": number(model, "max_position_embedding"),
    }
    data, micro_batches = number(parallel, "data_parallel") or 1, number(parallel, "micro_batch_num") or 1
    rows = number(runner, "batch_size") or 1
    stages = number(parallel, "pipeline_stage") or 1
    found.training = {
        "seq_length": number(model, "seq_length"),
        "micro_batch_size": rows,
        "global_batch_size": rows * data * (micro_batches if stages > 1 else 1),
        "recompute": "full" if _section(raw, "recompute_config").get("recompute") is True else "none",
    }
    found.parallel = {
        "data_parallel_replicate": data,
        "tensor_parallel": number(parallel, "model_parallel"),
        "pipeline_parallel": stages,
        "context_parallel": number(parallel, "context_parallel"),
    }
    interleave = number(model, "pp_interleave_num")
    if interleave and interleave > 1 and stages > 1:
        found.parallel |= {"virtual_pipeline": interleave, "pipeline_schedule": "interleaved"}
    rate = _section(raw, "lr_schedule").get("learning_rate")
    found.optimizer = {"lr": real_number(rate, "lr_schedule.learning_rate")}
    if _section(raw, "parallel").get("enable_parallel_optimizer") is True:
        found.notes.append("enable_parallel_optimizer: set parallel.data_parallel_shard to share states (FSDP2)")
    if model.get("offset"):
        found.notes.append("model_config.offset shifts layers between stages; set parallel.pipeline_layers for that")
    return found


def _section(raw: Any, key: str) -> dict[str, Any]:
    value = raw.get(key) if isinstance(raw, dict) else None
    return value if isinstance(value, dict) else {}


def _derived_ffn(model: dict[str, Any], hidden: int | None) -> int | None:
    """Llama's rule: two thirds of four times the width, scaled, rounded up to a multiple."""
    if hidden is None:
        return None
    scale = real_number(model.get("ffn_dim_multiplier"), "ffn_dim_multiplier") or 1.0
    unit = whole_number(model.get("multiple_of"), "multiple_of") or 256
    return -(-int(scale * int(8 * hidden / 3)) // unit) * unit
