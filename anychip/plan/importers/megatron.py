"""Argument lists and shell scripts of Megatron-LM and MindSpeed."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.arguments import Arguments
from anychip.plan.importers.found import Found
from anychip.plan.importers.megatron_layout import parallel_of, recompute_of
from anychip.plan.importers.megatron_notes import note_what_is_left
from anychip.plan.importers.megatron_parts import experts_of, latent_of, yarn_of
from anychip.plan.importers.parts import without_biases
from anychip.plan.importers.shell import read_script


def from_script(text: str, name: str, devices: int | None = None) -> Found:
    """The arguments of a script or of a bare list; `devices`: processes of the run, where the script does not say.

    Raises InputError for a variable that nothing sets where a number is needed.
    """
    script = read_script(text, "--num-layers")
    arguments = Arguments(script.words)
    found = Found(name, notes=list(script.notes))
    _refuse_others(found, arguments)
    found.model = _model(found, arguments, arguments.number("tensor-model-parallel-size") or 1)
    layers = found.model["num_hidden_layers"]
    found.parallel = parallel_of(found, arguments, script.variables, layers, devices)
    stages, chunks = found.parallel["pipeline_parallel"], found.parallel.get("virtual_pipeline", 1)
    batch = arguments.number("global-batch-size")
    found.training = {
        "seq_length": arguments.number("seq-length"),
        "micro_batch_size": arguments.number("micro-batch-size"),
        "global_batch_size": batch,
        "steps": _steps(arguments, batch),
        "compute_dtype": "bf16" if "bf16" in arguments else None,
        "recompute": recompute_of(found, arguments, layers, stages, chunks),
        "document_mask": True if "reset-attention-mask" in arguments else None,
    }
    found.optimizer = _optimizer(found, arguments)
    note_what_is_left(found, arguments)
    return found


def _steps(arguments: Arguments, batch: int | None) -> int | None:
    samples = arguments.number("train-samples")
    return max(1, samples // batch) if samples and batch and batch > 0 else arguments.number("train-iters")


def _optimizer(found: Found, arguments: Arguments) -> dict[str, Any]:
    kind = arguments.text("optimizer", "adam").lower()
    if kind not in ("adam", "adamw", "muon", "dist_muon"):
        found.notes.append(f"--optimizer {kind[:20]}: ours is AdamW, with two states a weight")
    first, second = arguments.real("adam-beta1"), arguments.real("adam-beta2")
    return {
        "name": "muon" if "muon" in kind else None,
        "lr": arguments.real("lr"),
        "weight_decay": arguments.real("weight-decay"),
        "grad_clip": arguments.real("clip-grad"),
        "betas": None if first is None and second is None else [first or 0.9, second or 0.999],
        "eps": arguments.real("adam-eps"),
        "router_bias_update_rate": arguments.real("moe-router-bias-update-rate"),
    }


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
        "hidden_dropout": _dropout(found, arguments),
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


def _dropout(found: Found, arguments: Arguments) -> float | None:
    if "hidden-dropout" not in arguments:
        found.notes.append(
            "--hidden-dropout and --attention-dropout are not given: Megatron's default of 0.1 is left out"
        )
    return arguments.real("hidden-dropout") or None


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
