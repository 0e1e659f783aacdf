"""torchtitan's TOML files, whose sizes are those of named flavours."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found, real_number, whole_number
from anychip.plan.importers.parts import expert_parallel, shared_states

_LLAMA3 = {
    "family": "llama",
    "biases": "none",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
}
_QWEN3 = {
    "family": "llama", "biases": "none", "vocab_size": 151_936, "num_key_value_heads": 4, "kv_channels": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "n_routed_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
_DEEPSEEK = {
    "family": "llama", "biases": "none", "vocab_size": 102_400, "rope_theta": 10_000.0, "q_lora_rank": 0,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": False,
    "yarn": {"factor": 40.0, "original_max_position_embeddings": 4096},
}  # fmt: skip


def _sizes(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, ffn, layers, heads), strict=True))


# Published shapes under the names that torchtitan gives them.
_FLAVORS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama3", "8B"): _LLAMA3 | _sizes(4096, 14_336, 32, 32),
    ("llama3", "70B"): _LLAMA3 | _sizes(8192, 28_672, 80, 64),
    ("llama3", "405B"): _LLAMA3 | _sizes(16_384, 53_248, 126, 128),
    ("qwen3", "30B-A3B"): _QWEN3 | _sizes(2048, 6144, 48, 32) | {"moe_intermediate_size": 768},
    ("qwen3", "235B-A22B"): _QWEN3 | _sizes(4096, 12_288, 94, 64) | {"moe_intermediate_size": 1536},
    ("deepseek_v3", "16B"): _DEEPSEEK
    | _sizes(2048, 10_944, 27, 16)
    | {"n_routed_experts": 64, "moe_intermediate_size": 1408},
    ("deepseek_v3", "236B"): _DEEPSEEK
    | _sizes(5120, 12_288, 60, 128)
    | {"q_lora_rank": 1536, "n_routed_experts": 160, "moe_intermediate_size": 1536, "routed_scaling_factor": 16.0},
    ("deepseek_v3", "671B"): _DEEPSEEK
    | _sizes(7168, 18_432, 61, 128)
    | {
        "family": "telechat3-moe", "vocab_size": 129_280, "q_lora_rank": 1536, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
_GROUPS = (("deepseek_v3", "236B"), ("deepseek_v3", "671B"))
_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved1f1b": "interleaved",
    "zbvzerobubble": "zero_bubble",
    "dualpipev": "dualpipe_v",
}


def from_toml(raw: dict[str, Any], name: str, devices: int | None = None) -> Found:
    """`devices`: processes of the run, which the file does not say.

    Raises InputError for flavours whose shapes are not published under that name.
    """
    found = Found(name)
    model, training = _section(raw, "model"), _section(raw, "training")
    parallel = _section(raw, "parallelism") or training  # the first releases kept degrees in [training]
    kind, flavor = str(model.get("name", "")), str(model.get("flavor", ""))
    if (kind, flavor) not in _FLAVORS:
        known = ", ".join(" ".join(pair) for pair in _FLAVORS)
        found.refuse(f"the flavour {flavor or '?'} of {kind or '?'} (known: {known})")
    found.model = dict(_FLAVORS[kind, flavor])
    if kind == "qwen3":
        found.notes.append("its norms of queries and keys are left out")
    if (kind, flavor) in _GROUPS:
        found.notes.append("its tokens choose among the experts of few groups only; ours choose among all")

    def degree(key: str) -> int | None:
        value = whole_number(parallel.get(key), key)
        return None if value is None or value < 1 else value

    rows = whole_number(training.get("local_batch_size", training.get("batch_size")), "local_batch_size") or 1
    batch = whole_number(training.get("global_batch_size"), "global_batch_size")
    found.training = {
        "seq_length": whole_number(training.get("seq_len"), "seq_len"),
        "micro_batch_size": rows,
        "global_batch_size": batch if batch and batch > 0 else None,
        "steps": whole_number(training.get("steps"), "steps"),
        "compute_dtype": "bf16",
        "recompute": _recompute(found, _section(raw, "activation_checkpoint")),
    }
    found.parallel = {
        "data_parallel_replicate": degree("data_parallel_replicate_degree"),
        "tensor_parallel": degree("tensor_parallel_degree"),
        "pipeline_parallel": degree("pipeline_parallel_degree"),
        "context_parallel": degree("context_parallel_degree"),
    }
    experts = degree("expert_parallel_degree") or 1
    shard = degree("data_parallel_shard_degree") or _what_is_left(found, devices, experts)
    found.parallel |= {"data_parallel_shard": shard} | expert_parallel(found, experts, shard)
    schedule = str(parallel.get("pipeline_parallel_schedule", "")).lower()
    if schedule in _SCHEDULES and (found.parallel["pipeline_parallel"] or 1) > 1:
        found.parallel["pipeline_schedule"] = _SCHEDULES[schedule]
        if _SCHEDULES[schedule] == "interleaved":
            found.parallel["virtual_pipeline"] = 2
            found.notes.append("interleaved with two stages a process; set parallel.virtual_pipeline for more")
    _note_what_is_left(found, raw)
    found.optimizer = {"lr": real_number(_section(raw, "optimizer").get("lr"), "optimizer.lr")}
    return found


def _what_is_left(found: Found, devices: int | None, experts: int) -> int | None:
    """Shards where the degree is -1: what the other degrees leave of `devices`."""
    others = 1
    for name in ("data_parallel_replicate", "tensor_parallel", "pipeline_parallel", "context_parallel"):
        others *= found.parallel[name] or 1
    shard = devices // others if devices and devices % others == 0 else None
    if devices and shard is None:
        found.notes.append(f"{devices} devices are no multiple of the other degrees ({others})")
    stages = found.parallel["pipeline_parallel"] or 1
    shared_states(found, "data_parallel_shard_degree -1 (what is left)", shard, stages, experts)
    return shard


def _recompute(found: Found, config: dict[str, Any]) -> str:
    mode, option = str(config.get("mode", "none")), str(config.get("selective_ac_option", ""))
    if mode == "selective" and option.isdecimal() and option != "1":
        taken = "full" if option == "2" else "none"
        found.notes.append(f"selective_ac_option {option[:9]}: every such layer is computed again; {taken} was taken")
        return taken
    if mode == "selective" and option != "1":
        found.notes.append(
            "activation_checkpoint selective (by operator): ours computes norms and SwiGLU again, and keeps the rest"
        )
        return "selective"
    if mode not in ("none", "full", "selective"):
        found.notes.append(f"activation_checkpoint {mode[:20]}: recompute none was taken")
    return "none" if mode not in ("full", "selective") else "full"


def _note_what_is_left(found: Found, raw: dict[str, Any]) -> None:
    """Settings that change memory or time and that recipes have no word for."""
    training, parallel = _section(raw, "training"), _section(raw, "parallelism")
    optimizer = str(_section(raw, "optimizer").get("name", "AdamW"))
    changed = (
        (_section(raw, "compile").get("enable") or training.get("compile"), "compile: set training.compile for that"),
        (_float8(raw), "float8 or mx: computes in 8 bits; ours computes in bf16, with more time and memory"),
        (training.get("enable_cpu_offload"), "enable_cpu_offload: ours keeps states on the device, with more memory"),
        (
            parallel.get("enable_async_tensor_parallel"),
            "enable_async_tensor_parallel: ours decides itself what to hide",
        ),
        (parallel.get("fsdp_reshard_after_forward") in ("never", False), "fsdp_reshard_after_forward is left out"),
        (parallel.get("disable_loss_parallel"), "disable_loss_parallel is left out"),
        (str(parallel.get("expert_tensor_parallel_degree", 1)) != "1", "expert_tensor_parallel_degree is left out"),
        (
            parallel.get("pipeline_parallel_split_points"),
            "pipeline_parallel_split_points: see parallel.pipeline_layers",
        ),
        (training.get("mixed_precision_param", "bfloat16") != "bfloat16", "mixed_precision_param: ours trains in bf16"),
        (
            optimizer.lower() not in ("adam", "adamw"),
            f"optimizer {optimizer[:20]}: ours is AdamW, with two states a weight",
        ),
    )
    found.notes += [sentence for given, sentence in changed if given]


def _float8(raw: dict[str, Any]) -> bool:
    converters = _section(raw, "model").get("converters") or []
    return any(str(word).startswith(("float8", "mx")) for word in converters) if isinstance(converters, list) else False


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}
