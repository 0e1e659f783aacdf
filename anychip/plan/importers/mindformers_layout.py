"""How a MindFormers file splits and recomputes a model, in the recipe's words; notes say where they have none."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found, whole_number
from anychip.plan.importers.parts import expert_parallel, nearest_recompute, shared_states

_MOST = 10_000  # stages in a list
_CHANGED: dict[str, dict[str, tuple[bool | None, str]]] = {
    "parallel_config": {
        "use_seq_parallel": (False, "ours always splits the sequence too, and needs less memory"),
        "seq_split_num": (None, "sequences are not taken through the pipeline in pieces"),
        "mem_coeff": (None, "has no counterpart"),
    },
    "recompute_config": {
        "select_comm_recompute": (None, "ours keeps what was communicated"),
        "mp_comm_recompute": (None, "ours communicates again in layers that are computed again"),
        "parallel_optimizer_comm_recompute": (None, "ours gathers weights by FSDP2's rules"),
        "recompute_slice_activation": (None, "ours keeps its share of a layer's input"),
    },
    "swap_config": {"swap": (None, "ours keeps activations on the device, with more memory")},
}


def parallel_of(found: Found, raw: dict[str, Any], stages: int, data: int) -> dict[str, Any]:
    """Fields of `parallel`."""
    parallel, run = section(raw, "parallel_config"), section(raw, "parallel")
    model = section(section(raw, "model"), "model_config")
    context = whole_number(parallel.get("context_parallel"), "context_parallel") or 1
    degree = whole_number(parallel.get("expert_parallel"), "expert_parallel") or 1
    fields: dict[str, Any] = {
        "data_parallel_replicate": data,
        "tensor_parallel": whole_number(parallel.get("model_parallel"), "model_parallel"),
        "pipeline_parallel": stages,
        "context_parallel": context,
    }
    if run.get("enable_parallel_optimizer") is True:
        shard = _weight_shard(run, data)
        shared_states(found, "enable_parallel_optimizer", shard, stages)
        fields |= {"data_parallel_shard": shard, "data_parallel_replicate": data // shard}
    if degree > 1:
        fields |= expert_parallel(found, degree, data) | {"data_parallel_replicate": None}
    method = str(parallel.get("context_parallel_algo", "colossalai_cp"))
    if context > 1 and method != "colossalai_cp":
        found.notes.append(f"context_parallel_algo {method[:30]}: recipes have ring and all_gather; ring was taken")
    interleave = whole_number(model.get("pp_interleave_num"), "pp_interleave_num")
    if interleave and interleave > 1 and stages > 1:
        fields |= {"virtual_pipeline": interleave, "pipeline_schedule": "interleaved"}
    if model.get("offset"):
        found.notes.append("model_config.offset shifts layers between stages; set parallel.pipeline_layers for that")
    return fields


def _weight_shard(run: dict[str, Any], data: int) -> int:
    """Processes that share states: all copies, or as many as the file says (-1: all)."""
    given = whole_number(
        section(run, "parallel_optimizer_config").get("optimizer_weight_shard_size"), "optimizer_weight_shard_size"
    )
    return given if given and 0 < given < data and data % given == 0 else data


def recompute_of(found: Found, raw: dict[str, Any], layers: int | None, stages: int) -> str:
    """The field `training.recompute`: True, a number of layers a stage, or a list of them by stage."""
    config = section(raw, "recompute_config")
    whole, chosen = config.get("recompute"), config.get("select_recompute")
    if whole is True:
        return "full"
    if whole and layers:
        counts = _counts(whole)
        each = sum(counts) if isinstance(whole, list) else sum(counts) * stages
        if each:
            return nearest_recompute(found, f"recompute_config.recompute {str(whole)[:60]}", each, layers, "the model")
    if chosen:
        found.notes.append(
            f"recompute_config.select_recompute {_short(chosen)}: recompute selective was taken, which computes norms "
            "and SwiGLU again, in all layers"
        )
        return "selective"
    return "none"


def _counts(value: Any) -> list[int]:
    """Whole numbers of a list, or of lists in a list."""
    if isinstance(value, int):
        return [] if isinstance(value, bool) else [max(0, value)]
    if not isinstance(value, list) or len(value) > _MOST:
        return []
    flat = [item for part in value[:100] for item in (part if isinstance(part, list) else [part])[:_MOST]]
    if not any(isinstance(part, list) for part in value):
        flat = value
    return [max(0, item) for item in flat if isinstance(item, int) and not isinstance(item, bool)]


def note_what_is_left(found: Found, raw: dict[str, Any]) -> None:
    """One note for each setting that changes memory or time and that recipes have no word for."""
    for name, settings in _CHANGED.items():
        config = section(raw, name)
        for key, (odd, sentence) in settings.items():
            value = config.get(key)
            given = value is odd if odd is not None else bool(value) and (value is True or value != 1)
            if given:
                found.notes.append(f"{name}.{key} {_short(value)}: {sentence}")
    model = section(section(raw, "model"), "model_config")
    kind = str(model.get("compute_dtype", "bfloat16"))
    if kind != "bfloat16":
        found.notes.append(f"compute_dtype {kind[:20]}: ours trains in bf16")
    optimizer = str(section(raw, "optimizer").get("type", "AdamW"))
    if "adamw" not in optimizer.lower():
        found.notes.append(f"optimizer {optimizer[:20]}: ours is AdamW, with two states a weight")


def section(raw: Any, key: str) -> dict[str, Any]:
    """A mapping inside another; empty where there is none."""
    value = raw.get(key) if isinstance(raw, dict) else None
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"of {len(value)} operators"
    return f"of {len(value)} stages" if isinstance(value, list) else str(value)[:30]
