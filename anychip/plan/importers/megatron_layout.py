"""How Megatron-LM and MindSpeed split and recompute a model, in the recipe's words; notes say where they have none."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.arguments import Arguments
from anychip.plan.importers.found import Found
from anychip.plan.importers.parts import expert_parallel, nearest_recompute, shared_states
from anychip.plan.importers.shell.expand import Variables

_SHARING = ("use-distributed-optimizer", "use-torch-fsdp2", "use-megatron-fsdp", "use-custom-fsdp")
_METHODS = {"p2p": "ring", "megatron_cp_algo": "ring", "all_gather": "all_gather", "kvallgather_cp_algo": "all_gather"}


def parallel_of(
    found: Found, arguments: Arguments, variables: Variables, layers: int | None, devices: int | None
) -> dict[str, Any]:
    """Fields of `parallel`. `devices`: processes of the run, where the caller knows them."""
    tensor = arguments.number("tensor-model-parallel-size") or 1
    pipeline = arguments.number("pipeline-model-parallel-size") or 1
    context = arguments.number("context-parallel-size") or 1
    if tensor > 1 and "sequence-parallel" not in arguments:
        found.notes.append("no --sequence-parallel: ours always splits the sequence too, and needs less memory")
    data = _data_parallel(found, devices or _processes(arguments, variables), tensor * pipeline * context)
    return {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "context_parallel": context,
        **(_context_method(found, arguments) if context > 1 else {}),
        **_shared(found, arguments, data, pipeline),
        **_stages(found, arguments, layers, pipeline),
    }


def _processes(arguments: Arguments, variables: Variables) -> int | None:
    """Processes that the launcher starts, as far as the script says."""
    here, nodes = arguments.text("nproc-per-node"), arguments.text("nnodes", "1")
    if _count(here) and _count(nodes):
        return int(here) * int(nodes)
    named = arguments.text("worker-num") or variables.text("WORLD_SIZE") or ""
    return int(named) if _count(named) else None


def _count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0


def _data_parallel(found: Found, processes: int | None, others: int) -> int | None:
    if processes is None or others < 1:
        return None
    if processes % others:
        found.notes.append(f"{processes} processes are no multiple of the other degrees ({others}): copies stay open")
        return None
    return processes // others


def _shared(found: Found, arguments: Arguments, data: int | None, pipeline: int) -> dict[str, Any]:
    """Sharded states, and experts, which ours shares among the shards of one copy."""
    given = [name for name in _SHARING if name in arguments]
    instances = arguments.number("num-distributed-optimizer-instances") or 1
    degree = arguments.number("expert-model-parallel-size") or 1
    shard = None
    if given and data is not None:
        shard = data // instances if instances > 0 and data % instances == 0 else data
    if given:
        shared_states(found, f"--{given[0]}", shard, pipeline, degree)
    if degree > 1:
        return expert_parallel(found, degree, shard)
    return {"data_parallel_shard": shard}


def _context_method(found: Found, arguments: Arguments) -> dict[str, Any]:
    """MindSpeed's and Megatron's names for what travels between the parts of a sequence."""
    for name in ("context-parallel-algo", "cp-comm-type"):
        given = arguments.text(name)
        if not given:
            continue
        if given not in _METHODS:
            found.notes.append(f"--{name} {given[:30]}: recipes have ring and all_gather; ring was taken")
        return {"context_method": _METHODS.get(given, "ring")}
    return {}


def _stages(found: Found, arguments: Arguments, layers: int | None, pipeline: int) -> dict[str, Any]:
    """Virtual stages, MindSpeed's and Megatron's other schedules, and stages of unequal depth."""
    if arguments.text("schedules-method") == "dualpipev":
        return {"pipeline_schedule": "dualpipe_v"}
    each = arguments.number("num-layers-per-virtual-pipeline-stage")
    stages = arguments.number("num-virtual-stages-per-pipeline-rank")
    if each and each > 0 and layers and pipeline > 1:
        stages = layers // (pipeline * each)
        if stages * pipeline * each != layers:
            found.notes.append(f"{layers} layers are no multiple of {pipeline} stages of {each} layers: {stages} taken")
    if stages and stages > 1 and pipeline > 1:
        return {"virtual_pipeline": stages, "pipeline_schedule": "interleaved"}
    return {"pipeline_layers": depths} if (depths := _depths(arguments, layers or 0, pipeline)) else {}


def _depths(arguments: Arguments, layers: int, pipeline: int) -> list[int]:
    """Layers of each stage, where they are given and not equal."""
    if listed := arguments.text("num-layer-list"):
        depths = [int(part) for part in listed.split(",") if _count(part.strip())]
        return depths if len(depths) == pipeline and sum(depths) == layers else []
    first = arguments.number("decoder-first-pipeline-num-layers")
    last = arguments.number("decoder-last-pipeline-num-layers")
    ends = (first is not None) + (last is not None)
    inner, rest = pipeline - ends, layers - (first or 0) - (last or 0)
    if not ends or not 0 < inner <= 1000 or rest < 0 or rest % inner or min(first or 1, last or 1) < 0:
        return []
    return [*([first] if first is not None else []), *[rest // inner] * inner, *([last] if last is not None else [])]


def recompute_of(found: Found, arguments: Arguments, layers: int | None, stages: int, chunks: int) -> str:
    """The field `training.recompute`. `stages` processes of a pipeline hold `chunks` runs of layers each."""
    kind, method = arguments.text("recompute-granularity"), arguments.text("recompute-method")
    count = arguments.number("recompute-num-layers")
    if kind == "full" and method == "block" and count:
        runs = stages if "enable-recompute-layers-per-pp-rank" in arguments else stages * chunks
        deep = -(-(layers or 0) // max(1, runs))
        return nearest_recompute(found, f"--recompute-method block --recompute-num-layers {count}", count, deep)
    if kind == "full":
        if count and count > 1:
            found.notes.append(
                f"--recompute-num-layers {count} keeps one input for {count} layers; ours keeps each layer's"
            )
        return "full"
    modules = arguments.many("recompute-modules") or ["core_attn"]
    if kind == "selective" or "recompute-activations" in arguments:
        found.notes.append(
            f"selective recomputation of {' '.join(modules)[:60]}: ours computes norms and SwiGLU again, and never "
            "keeps the scores of attention"
        )
        return "selective"
    for name in ("recompute-activation-function", "recompute-norm"):
        if name in arguments:
            found.notes.append(f"--{name}: recompute selective was taken, which computes norms and SwiGLU again")
            return "selective"
    return "none"
