"""Training speed of mixtures of experts beside transformers' DeepSeek-V3 and Mixtral classes of the same shape.

Contestants train in turn, each in a process of its own, as in benchmarks/training.py. Prints a table of medians.
Needs the `bench` extra.

    python benchmarks/experts.py --shape deepseek --rounds 5
    python benchmarks/experts.py --shape mixtral --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

VOCAB, BATCH, SEQ = 8192, 4, 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": SEQ,
    "biases": "none",
}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek": {
        **COMMON,
        "family": "telechat3-moe",
        "intermediate_size": 1152,
        "num_key_value_heads": 6,
        "q_lora_rank": 192,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 224,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "mixtral": {
        **COMMON,
        "family": "llama",
        "intermediate_size": 768,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
    },
}
# name -> (whose, dtype, compiled, how transformers runs its experts)
CONTESTANTS = {
    "anychip": ("anychip", "auto", False, ""),
    "anychip, compiled": ("anychip", "auto", True, ""),
    "HF bf16 autocast": ("hf", "bf16", False, "eager"),
    "HF bf16 autocast, grouped_mm": ("hf", "bf16", False, "grouped_mm"),
    "HF fp32": ("hf", "fp32", False, "eager"),
    "HF fp32, grouped_mm": ("hf", "fp32", False, "grouped_mm"),
}


def anychip_step(shape: str, dtype_name: str, compiled: bool):
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators import operators_for
    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import ModelConfig, OptimizerConfig, TrainingConfig
    from anychip.train.engine import prove_attention
    from anychip.train.loss import head_cross_entropy
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.recompute import apply_recompute

    backend = detect_backend()
    backend.prepare_process()
    training = TrainingConfig(steps=1)
    config, operators = ModelConfig(**SHAPES[shape]), operators_for(backend.vendor)
    dtype = compute_dtype(dtype_name, backend)
    model = Decoder(config, dtype, operators)
    init_parameters(model, config, 0)
    apply_recompute(model, training.recompute)
    if compiled:
        prove_attention(config, dtype, operators, torch.device("cpu"))
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig(), dtype, operators)
    learned = [p for name, p in model.named_parameters() if not name.endswith("correction_bias")]
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1))

    def step() -> None:
        loss = head_cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1),
            model.head_weight,
            tokens[:, 1:].flatten(),
            training.loss_chunk_tokens,
            cross_entropy=operators.cross_entropy,
        )
        (loss / (BATCH * SEQ)).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step(3e-4)
        model.zero_grad(set_to_none=True)

    return step


def hf_step(shape: str, dtype_name: str, experts: str):
    import torch
    import transformers

    from anychip.families.layouts import config_to_json
    from anychip.recipe.schema import ModelConfig

    raw = config_to_json(ModelConfig(**SHAPES[shape]), "float32", None, 2, None)
    raw = {name: value for name, value in raw.items() if name not in ("torch_dtype", "architectures")}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **{**raw, "use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(name: str, shape: str) -> None:
    """Train one step for each line read; answer with its seconds and the peak memory so far."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    whose, dtype_name, compiled, experts = CONTESTANTS[name]
    step = anychip_step(shape, dtype_name, compiled) if whose == "anychip" else hf_step(shape, dtype_name, experts)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


class Contestant:
    def __init__(self, name: str, shape: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "--shape", shape]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.memory = 0

    def step(self, keep: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.memory = answer["memory"]
        if keep:
            self.seconds.append(answer["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="deepseek")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--worker", choices=CONTESTANTS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.shape)
        return
    from anychip.model.arithmetic import num_active_parameters, num_parameters
    from anychip.recipe.schema import ModelConfig

    config = ModelConfig(**SHAPES[arguments.shape])
    print(f"{num_parameters(config):,} parameters, {num_active_parameters(config):,} active; {BATCH} x {SEQ} tokens\n")
    contestants = {name: Contestant(name, arguments.shape) for name in arguments.only}
    for number in range(arguments.rounds + 2):  # the first two rounds warm up and compile
        for contestant in contestants.values():
            contestant.step(keep=number > 1)
    rates = {name: BATCH * SEQ / statistics.median(c.seconds) for name, c in contestants.items()}
    others = [name for name in rates if name.startswith("HF")]
    print(f"| {arguments.shape} | tokens/s | peak memory |" + "".join(f" x {name} |" for name in others))
    print("|---|---|---|" + "---|" * len(others))
    for name, rate in rates.items():
        ratios = "".join(f" {rate / rates[other]:.2f} |" for other in others)
        print(f"| {name} | {rate:,.0f} | {contestants[name].memory / 2**30:.2f} GiB |{ratios}")


if __name__ == "__main__":
    main()
