"""Arguments of Megatron-LM and MindSpeed that change memory or time and that recipes have no word for."""

from __future__ import annotations

import re

from anychip.plan.importers.arguments import Arguments
from anychip.plan.importers.found import Found

_EIGHT_BITS = "computes in 8 bits; ours computes in bf16, with more time and memory"
_MOVED = "moves states or activations to the host; ours keeps them on the device, with more memory"
_DTYPES = "other number formats of states or gradients; ours are fp32"
_OVERLAP = "ours decides itself what communication hides behind"
_RECOMPUTED = "recomputes more, or elsewhere, than a recipe can say; left out"
_STAGES = "is not taken over: stages are as even as can be (parallel.pipeline_layers)"
_EXPERTS = "is not taken over: ours sends tokens to experts by all-to-all inside parallel.expert_parallel"
_CHANGED = {
    "fp16": "ours trains in bf16",
    "optimizer-cpu-offload": _MOVED,
    "cpu-offloading": _MOVED,
    "swap-optimizer": _MOVED,
    "swap-attention": _MOVED,
    "fine-grained-activation-offloading": _MOVED,
    "use-precision-aware-optimizer": _DTYPES,
    "main-params-dtype": _DTYPES,
    "main-grads-dtype": _DTYPES,
    "exp-avg-dtype": _DTYPES,
    "exp-avg-sq-dtype": _DTYPES,
    "grad-reduce-in-bf16": _DTYPES,
    "reuse-fp32-param": "keeps no second copy of weights; ours has fp32 weights and their bf16 casts",
    "overlap-grad-reduce": _OVERLAP,
    "overlap-param-gather": _OVERLAP,
    "tp-comm-overlap": _OVERLAP,
    "use-ascend-mc2": _OVERLAP,
    "use-ascend-coc": _OVERLAP,
    "delay-wgrad-compute": _OVERLAP,
    "overlap-moe-expert-parallel-comm": _OVERLAP,
    "moe-fb-overlap": _OVERLAP,
    "moe-alltoall-overlap-comm": _OVERLAP,
    "recompute-in-advance": _RECOMPUTED,
    "recompute-in-bubble": _RECOMPUTED,
    "adaptive-recompute-device-swap": _RECOMPUTED,
    "moe-layer-recompute": _RECOMPUTED,
    "moe-zero-memory": _RECOMPUTED,
    "mla-zero-memory": _RECOMPUTED,
    "moe-layer-freq-recompute": _RECOMPUTED,
    "account-for-embedding-in-pipeline-split": _STAGES,
    "account-for-loss-in-pipeline-split": _STAGES,
    "pipeline-model-parallel-layout": _STAGES,
    "expert-tensor-parallel-size": _EXPERTS,
    "moe-tp-extend-ep": _EXPERTS,
    "moe-token-dispatcher-type": _EXPERTS,
    "moe-pad-expert-input-to-capacity": _EXPERTS,
    "data-parallel-sharding-strategy": "ours shares weights, gradients and states; with a pipeline states only",
    "tp-2d": "is not taken over: ours splits each matrix along one dimension",
    "window-size": "is not taken over: attention is over the whole sequence",
    "rampup-batch-size": "is not taken over: ours keeps training.global_batch_size from the first step",
    "attention-dropout": "is not taken over",
    "lora-r": "is not taken over: the recipe trains all weights (anychip sft tunes adapters)",
    "enable-cuda-graph": "is not taken over",
    "cuda-graph-impl": "is not taken over",
    "ddp-num-buckets": "is not taken over",
    "ddp-bucket-size": "is not taken over",
    "attention-backend": "ours uses the chip's fused attention where there is one",
    "noop-transformer-layers": "is not taken over",
}
# Neither memory nor time of a step: names of files, logs, checkpoints, launchers; kernels that ours has or needs not.
_HARMLESS = re.compile(
    r"(save|load|log|tensorboard|wandb|data-(path|cache|args|impl)|dataset|tokenizer|eval|test|train-data|valid|split|vocab-file|merge-file|seed|init|"
    r"exit|dist|node|master|nproc|nnodes|rdzv|standalone|tee|redirects|role|max-restarts|local|worker|join|container|"
    r"mpi|ntasks|gpus|timing|no-(load|save|log|initialization|create|masked|bias|gradient|rope|check|shared)|"
    r"use-(mcore|flash-attn|fused|checkpoint|cpu|legacy|dist-ckpt|tp-pp)|ckpt|async|auto|override|spec|"
    r"transformer-impl|handling|prompt|stage|dataloader|mmap|num-workers|cross-entropy|lr|min-lr|adam|"
    r"accumulate-allreduce|attention-softmax|bf16|max-position|mock-data|profile|jit|manual-gc|"
    r"distributed-(backend|timeout)|make-vocab|tiktoken|mtp|rotary-percent|sequence-parallel|moe-(router-dtype|grouped|"
    r"permut|router-fusion)|masked|apply|enable-one|pretrained|finetune|model-type|hf)($|-)"
)
_LISTED = 20


def note_what_is_left(found: Found, arguments: Arguments) -> None:
    """One note for each setting that changes memory or time; one with the names of all arguments that nobody knows."""
    fp8 = [name for name in arguments.unread() if name.startswith(("fp8", "fp4"))]
    for name in fp8[:1]:
        found.notes.append(f"--{name}: {_EIGHT_BITS}")
    for name, sentence in _CHANGED.items():
        if name in arguments and not _off(name, arguments.text(name)):
            found.notes.append(f"--{name}: {sentence}")
    unknown = [name for name in arguments.unread() if name not in fp8 and not _HARMLESS.match(name)]
    if unknown:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        listed = ", ".join(f"--{name[:50]}" for name in unknown[:_LISTED])
        found.notes.append(f"arguments without a counterpart, left out: {listed}{more}")


def _off(name: str, value: str) -> bool:
    """A setting that is given at the value it has when it is not."""
    if name in ("attention-dropout", "lora-r"):
        return value in ("0", "0.0", "0.", "false")
    if name == "expert-tensor-parallel-size":
        return value == "1"
    if name == "moe-token-dispatcher-type":
        return value.startswith("alltoall")
    return name == "attention-backend" and value in ("auto", "flash", "fused")
