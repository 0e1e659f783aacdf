"""torchtitan's TOML files, whose sizes are those of named flavours."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found, real_number, whole_number

# Published shapes of Llama 3: vocabulary, hidden, ffn, layers, heads, key-value heads.
_LLAMA3 = {
    "8B": (128_256, 4096, 14_336, 32, 32, 8),
    "70B": (128_256, 8192, 28_672, 80, 64, 8),
    "405B": (128_256, 16_384, 53_248, 126, 128, 8),
}
_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved1f1b": "interleaved",
    "zbvzerobubble": "zero_bubble",
    "dualpipev": "dualpipe_v",
}


def from_toml(raw: dict[str, Any], name: str) -> Found:
    """Raises InputError for flavours whose shapes are not published under that name."""
    found = Found(name)
    model, training = _section(raw, "model"), _section(raw, "training")
    parallel = _section(raw, "parallelism") or training  # the first releases kept degrees in [training]
    kind, flavor = str(model.get("name", "")), str(model.get("flavor", ""))
    if kind != "llama3" or flavor not in _LLAMA3:
        found.refuse(f"the flavour {flavor or '?'} of {kind or '?'} (known: llama3 of {', '.join(_LLAMA3)})")
    vocab, hidden, ffn, layers, heads, kv_heads = _LLAMA3[flavor]
    found.model = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 500_000.0,
    }  # fmt: skip

    def degree(key: str) -> int | None:
        value = whole_number(parallel.get(key), key)
        return None if value is None or value < 1 else value

    shard = degree("data_parallel_shard_degree")
    if shard is None:
        found.notes.append("data_parallel_shard_degree is -1 (what is left): set parallel.data_parallel_shard")
    rows = whole_number(training.get("local_batch_size", training.get("batch_size")), "local_batch_size") or 1
    batch = whole_number(training.get("global_batch_size"), "global_batch_size")
    found.training = {
        "seq_length": whole_number(training.get("seq_len"), "seq_len"),
        "micro_batch_size": rows,
        "global_batch_size": batch if batch and batch > 0 else None,
        "steps": whole_number(training.get("steps"), "steps"),
        "compute_dtype": "bf16",
        "recompute": {"full": "full", "selective": "selective"}.get(
            str(_section(raw, "activation_checkpoint").get("mode")), "none"
        ),
    }
    found.parallel = {
        "data_parallel_replicate": degree("data_parallel_replicate_degree"),
        "data_parallel_shard": shard,
        "tensor_parallel": degree("tensor_parallel_degree"),
        "pipeline_parallel": degree("pipeline_parallel_degree"),
        "context_parallel": degree("context_parallel_degree"),
    }
    schedule = str(parallel.get("pipeline_parallel_schedule", "")).lower()
    if schedule in _SCHEDULES and (found.parallel["pipeline_parallel"] or 1) > 1:
        found.parallel["pipeline_schedule"] = _SCHEDULES[schedule]
        if _SCHEDULES[schedule] == "interleaved":
            found.parallel["virtual_pipeline"] = 2
            found.notes.append("interleaved with two stages a process; set parallel.virtual_pipeline for more")
    found.optimizer = {"lr": real_number(_section(raw, "optimizer").get("lr"), "optimizer.lr")}
    return found


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}
