"""Argument lists and shell scripts of Megatron-LM and MindSpeed, read without being executed."""

from __future__ import annotations

import re
import shlex
from typing import Any

from anychip.errors import InputError
from anychip.plan.importers.found import Found, real_number, whole_number

_ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?-([^}]*))?\}|\$([A-Za-z_]\w*)")
_QUOTED_ARRAY = re.compile(r'"(\$\{[A-Za-z_]\w*\[[@*]\]\})"')
_DEPTH = 20  # of variables in variables


def from_script(text: str, name: str) -> Found:
    """The arguments of a script or of a bare list. Raises InputError for a variable that nothing sets."""
    arguments = _arguments(text)
    found = Found(name)
    if "num-experts" in arguments and arguments["num-experts"] not in ("0", "1", "true"):
        found.refuse("a mixture of experts")
    if "multi-latent-attention" in arguments or "multi-head-latent-attention" in arguments:
        found.refuse("latent attention")
    if arguments.get("normalization", "LayerNorm").lower() != "rmsnorm":
        found.refuse("layers with LayerNorm (no --normalization RMSNorm)")
    if "swiglu" not in arguments:
        found.refuse("a feed-forward without --swiglu")
    if arguments.get("position-embedding-type", "rope") != "rope" and "use-rotary-position-embeddings" not in arguments:
        found.refuse(f"positions of type {arguments['position-embedding-type']}")
    if "untie-embeddings-and-output-weights" not in arguments:
        found.notes.append("its embedding and head share weights; ours are two matrices")

    def number(key: str) -> int | None:
        return whole_number(arguments.get(key), f"--{key}")

    tensor, pipeline = number("tensor-model-parallel-size") or 1, number("pipeline-model-parallel-size") or 1
    layers, grouped = number("num-layers"), "group-query-attention" in arguments
    found.model = {
        "vocab_size": _vocabulary(arguments, tensor, found),
        "hidden_size": number("hidden-size"),
        "intermediate_size": number("ffn-hidden-size"),
        "num_hidden_layers": layers,
        "num_attention_heads": number("num-attention-heads"),
        "num_key_value_heads": number("num-query-groups") if grouped else None,
        "rms_norm_eps": real_number(arguments.get("norm-epsilon"), "--norm-epsilon"),
        "rope_theta": real_number(arguments.get("rotary-base"), "--rotary-base"),
        "max_position_embeddings": number("max-position-embeddings"),
    }
    found.training = {
        "seq_length": number("seq-length"),
        "micro_batch_size": number("micro-batch-size"),
        "global_batch_size": number("global-batch-size"),
        "steps": number("train-iters"),
        "compute_dtype": "bf16" if "bf16" in arguments else None,
        "recompute": _recompute(arguments),
    }
    if "fp16" in arguments:
        found.notes.append("--fp16: anychip trains in bf16")
    found.parallel = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "context_parallel": number("context-parallel-size"),
        **_interleaved(arguments, layers, pipeline),
    }
    if "use-distributed-optimizer" in arguments:
        found.notes.append("--use-distributed-optimizer: set parallel.data_parallel_shard to share states (FSDP2)")
    found.optimizer = {
        "lr": real_number(arguments.get("lr"), "--lr"),
        "weight_decay": real_number(arguments.get("weight-decay"), "--weight-decay"),
        "grad_clip": real_number(arguments.get("clip-grad"), "--clip-grad"),
    }
    return found


def _vocabulary(arguments: dict[str, str], tensor: int, found: Found) -> int | None:
    """The size that Megatron pads to: a multiple of --make-vocab-size-divisible-by x tensor parallel."""
    padded = whole_number(arguments.get("padded-vocab-size"), "--padded-vocab-size")
    if padded:
        return padded
    size = whole_number(arguments.get("vocab-size"), "--vocab-size")
    if size is None:
        found.notes.append("the vocabulary's size is not in the script; 131072 was taken")
        return 131_072
    key = "make-vocab-size-divisible-by"
    unit = max(1, tensor) * max(1, whole_number(arguments.get(key, "128"), f"--{key}") or 1)
    return -(-size // unit) * unit


def _recompute(arguments: dict[str, str]) -> str | None:
    kind = arguments.get("recompute-granularity")
    if kind in ("full", "selective"):
        return kind
    return "selective" if "recompute-activations" in arguments else "none"


def _interleaved(arguments: dict[str, str], layers: int | None, pipeline: int) -> dict[str, Any]:
    """Virtual stages, and MindSpeed's and Megatron's other schedules."""
    if arguments.get("schedules-method") == "dualpipev":
        return {"pipeline_schedule": "dualpipe_v"}
    key = "num-layers-per-virtual-pipeline-stage"
    each = whole_number(arguments.get(key), f"--{key}")
    stages = whole_number(
        arguments.get("num-virtual-stages-per-pipeline-rank"), "--num-virtual-stages-per-pipeline-rank"
    )
    if each and layers and pipeline > 1:
        stages = layers // (pipeline * each)
    if stages and stages > 1 and pipeline > 1:
        return {"virtual_pipeline": stages, "pipeline_schedule": "interleaved"}
    return {}


def _arguments(text: str) -> dict[str, str]:
    """`--name value` pairs of all arguments in the text; a flag alone is "true". Later ones win, as in argparse."""
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in _lines(text):
        if (match := _ASSIGNMENT.match(line)) and not line.lstrip().startswith("--"):
            value = match.group(2).strip()
            variables[match.group(1)] = value[1:-1] if value[:1] == "(" and value[-1:] == ")" else _unquoted(value)
        elif "--" in line:
            words += _split(_resolved(line, variables))
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else "true"
        elif name is not None and found[name] == "true":
            found[name] = word
    if not found:
        raise InputError("holds no --arguments.", do="Give a Megatron or MindSpeed script, or its list of arguments.")
    return found


def _lines(text: str) -> list[str]:
    """Whole commands: comments dropped, continued lines and arrays joined."""
    text = re.sub(r"\\\r?\n", " ", text)
    lines, pending = [], ""
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        pending = f"{pending} {line}".strip() if pending else line
        opens = re.match(r"^(?:export\s+)?[A-Za-z_]\w*=\(", pending) and not pending.endswith(")")
        quoted = re.match(r'^(?:export\s+)?[A-Za-z_]\w*="', pending) and pending.count('"') % 2 == 1
        if not (opens or quoted):
            lines.append(pending)
            pending = ""
    return [line for line in [*lines, pending] if line]


def _resolved(line: str, variables: dict[str, str]) -> str:
    """Put in what variables were set to. Unknown ones stay and are refused only where a value is needed."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(3)
        return variables.get(name, match.group(2) if match.group(2) is not None else match.group(0))

    line = _QUOTED_ARRAY.sub(r"\1", line)  # each of its elements is a word of its own
    for _ in range(_DEPTH):
        replaced = _REFERENCE.sub(value, line)
        if replaced == line or len(replaced) > 1_000_000:
            break
        line = replaced
    return line


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
