"""Argument lists and shell scripts of Megatron-LM and MindSpeed."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found
from anychip.plan.importers.megatron_parts import Arguments, experts_of, latent_of, yarn_of
from anychip.plan.importers.parts import expert_parallel, without_biases
from anychip.plan.importers.shell import arguments_of


def from_script(text: str, name: str) -> Found:
    """The arguments of a script or of a bare list. Raises InputError for a variable that nothing sets."""
    arguments = Arguments(arguments_of(text))
    found = Found(name)
    _refuse_others(found, arguments)
    tensor = arguments.number("tensor-model-parallel-size") or 1
    pipeline = arguments.number("pipeline-model-parallel-size") or 1
    found.model = _model(found, arguments, tensor)
    found.training = {
        "seq_length": arguments.number("seq-length"),
        "micro_batch_size": arguments.number("micro-batch-size"),
        "global_batch_size": arguments.number("global-batch-size"),
        "steps": arguments.number("train-iters"),
        "compute_dtype": "bf16" if "bf16" in arguments else None,
        "recompute": _recompute(arguments),
    }
    if "fp16" in arguments:
        found.notes.append("--fp16: anychip trains in bf16")
    found.parallel = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "context_parallel": arguments.number("context-parallel-size"),
        **expert_parallel(found, arguments.number("expert-model-parallel-size")),
        **_interleaved(arguments, found.model["num_hidden_layers"], pipeline),
    }
    if "use-distributed-optimizer" in arguments and "data_parallel_shard" not in found.parallel:
        found.notes.append("--use-distributed-optimizer: set parallel.data_parallel_shard to share states (FSDP2)")
    found.optimizer = {
        "lr": arguments.real("lr"),
        "weight_decay": arguments.real("weight-decay"),
        "grad_clip": arguments.real("clip-grad"),
        "router_bias_update_rate": arguments.real("moe-router-bias-update-rate"),
    }
    return found


def _refuse_others(found: Found, arguments: Arguments) -> None:
    if arguments.text("normalization", "LayerNorm").lower() != "rmsnorm":
        found.refuse("layers with LayerNorm (no --normalization RMSNorm)")
    if "swiglu" not in arguments:
        found.refuse("a feed-forward without --swiglu")
    positions = arguments.text("position-embedding-type", "rope")
    if positions != "rope" and "use-rotary-position-embeddings" not in arguments:
        found.refuse(f"positions of type {positions}")


def _model(found: Found, arguments: Arguments, tensor: int) -> dict[str, Any]:
    layers = arguments.number("num-layers")
    if layers and (idle := [word for word in arguments.text("noop-layers").split(",") if word.strip().isdigit()]):
        layers -= len(idle)
        found.notes.append(f"--noop-layers: {layers} layers do work; say with parallel.pipeline_layers where they are")
    heads, hidden = arguments.number("num-attention-heads"), arguments.number("hidden-size")
    width = arguments.number("kv-channels")
    model: dict[str, Any] = {
        "vocab_size": _vocabulary(found, arguments, tensor),
        "hidden_size": hidden,
        "intermediate_size": arguments.number("ffn-hidden-size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": arguments.number("num-query-groups") if "group-query-attention" in arguments else None,
        "kv_channels": width if width and heads and hidden and width * heads != hidden else None,
        "rms_norm_eps": arguments.real("norm-epsilon"),
        "rope_theta": arguments.real("rotary-base"),
        "max_position_embeddings": arguments.number("max-position-embeddings"),
        "tie_word_embeddings": None if "untie-embeddings-and-output-weights" in arguments else True,
        "num_nextn_predict_layers": arguments.number("mtp-num-layers"),
        "mtp_loss_scaling_factor": arguments.real("mtp-loss-scaling-factor"),
        **latent_of(arguments),
        **experts_of(found, arguments, layers),
        **yarn_of(found, arguments),
    }
    if "disable-bias-linear" in arguments or "kv_lora_rank" in model or "n_routed_experts" in model:
        model |= without_biases(model)
    for flag, what in (("add-qkv-bias", "biases of queries, keys and values"), ("qk-layernorm", "norms of queries")):
        if flag in arguments and not ("kv_lora_rank" in model and flag == "qk-layernorm"):  # latent attention has them
            found.notes.append(f"--{flag}: {what} are left out")
    return model


def _vocabulary(found: Found, arguments: Arguments, tensor: int) -> int | None:
    """The size that Megatron pads to: a multiple of --make-vocab-size-divisible-by x tensor parallel."""
    if padded := arguments.number("padded-vocab-size"):
        return padded
    size = arguments.number("vocab-size")
    if size is None:
        found.notes.append("the vocabulary's size is not in the script; 131072 was taken")
        return 131_072
    divisor = arguments.number("make-vocab-size-divisible-by")
    unit = max(1, tensor) * max(1, 128 if divisor is None else divisor)
    return -(-size // unit) * unit


def _recompute(arguments: Arguments) -> str | None:
    kind = arguments.text("recompute-granularity")
    if kind in ("full", "selective"):
        return kind
    return "selective" if "recompute-activations" in arguments else "none"


def _interleaved(arguments: Arguments, layers: int | None, pipeline: int) -> dict[str, Any]:
    """Virtual stages, and MindSpeed's and Megatron's other schedules."""
    if arguments.text("schedules-method") == "dualpipev":
        return {"pipeline_schedule": "dualpipe_v"}
    each = arguments.number("num-layers-per-virtual-pipeline-stage")
    stages = arguments.number("num-virtual-stages-per-pipeline-rank")
    if each and layers and pipeline > 1:
        stages = layers // (pipeline * each)
    if stages and stages > 1 and pipeline > 1:
        return {"virtual_pipeline": stages, "pipeline_schedule": "interleaved"}
    return {}
