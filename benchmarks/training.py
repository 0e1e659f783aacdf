"""Training speed and memory beside Hugging Face transformers, interleaved on this machine.

Each contestant is a process of its own that trains one step when asked, so that steps of all contestants alternate and
peak memory is each one's own. Prints a Markdown table of medians. Needs the `bench` extra.

    python benchmarks/training.py --shape small --rounds 5
    python benchmarks/training.py --shape medium --rounds 3
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
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    seq: int = 512


SHAPES = {
    "small": Shape(8, 384, 1024, 8, 4, 8192, 8),
    "medium": Shape(12, 768, 2048, 12, 4, 32_000, 4),
}
SLOW_SECONDS = 60.0
CONTESTANTS = {
    "anychip": ("anychip", "auto", False),
    "anychip, compiled": ("anychip", "auto", True),
    "anychip bf16": ("anychip", "bf16", False),
    "HF bf16 autocast": ("hf", "bf16", False),
    "HF fp32": ("hf", "fp32", False),
    "HF fp32, compiled": ("hf", "fp32", True),
}


def model_config(shape: Shape):
    from anychip.recipe.schema import ModelConfig

    return ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )


def anychip_step(shape: Shape, dtype_name: str, compiled: bool):
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators import operators_for
    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import OptimizerConfig, TrainingConfig
    from anychip.train.engine import prove_attention
    from anychip.train.loss import head_cross_entropy
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.recompute import apply_recompute

    backend = detect_backend()
    backend.prepare_process()
    training = TrainingConfig(steps=1)
    config, dtype, operators = model_config(shape), compute_dtype(dtype_name, backend), operators_for(backend.vendor)
    model = Decoder(config, dtype, operators)
    init_parameters(model, config, 0)
    apply_recompute(model, training.recompute)
    if compiled:
        prove_attention(config, dtype, operators, torch.device("cpu"))
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig(), dtype, operators)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq + 1))

    def step() -> None:
        hidden = model(tokens[:, :-1]).flatten(0, 1)
        loss = head_cross_entropy(
            hidden,
            model.lm_head.weight,
            tokens[:, 1:].flatten(),
            training.loss_chunk_tokens,
            cross_entropy=operators.cross_entropy,
        )
        (loss / (shape.batch * shape.seq)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(3e-4)
        model.zero_grad(set_to_none=True)

    return step


def hf_step(shape: Shape, dtype_name: str, compiled: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(name: str, shape: Shape) -> None:
    """Train one step for each line read; answer with its seconds and the peak memory so far."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    kind, dtype_name, compiled = CONTESTANTS[name]
    step = (anychip_step if kind == "anychip" else hf_step)(shape, dtype_name, compiled)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


class Contestant:
    def __init__(self, name: str, shape_name: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "--shape", shape_name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.memory = 0

    def step(self, keep: bool) -> None:
        """Train one step. One that takes minutes is asked once only: its warm-up is nothing beside it."""
        if self.seconds and self.seconds[0] > SLOW_SECONDS:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.memory = answer["memory"]
        if keep or answer["seconds"] > SLOW_SECONDS:
            self.seconds.append(answer["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--worker", choices=CONTESTANTS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.worker:
        work(arguments.worker, shape)
        return

    import torch

    from anychip.chips.backend import measure_matmul_flops
    from anychip.model.arithmetic import flops_per_token

    peaks = {d: measure_matmul_flops(torch.device("cpu"), getattr(torch, d), 2.0) for d in ("float32", "bfloat16")}
    print(
        f"matrix-multiplication peak: fp32 {peaks['float32'] / 1e9:.0f}, bf16 {peaks['bfloat16'] / 1e9:.0f} GFLOP/s\n"
    )
    contestants = {name: Contestant(name, arguments.shape) for name in arguments.only}
    for number in range(arguments.rounds + 1):  # the first round warms up and compiles
        for contestant in contestants.values():
            contestant.step(keep=number > 0)
    flops = flops_per_token(model_config(shape), shape.seq).model
    tokens = shape.batch * shape.seq
    rates = {name: tokens / statistics.median(c.seconds) for name, c in contestants.items()}
    best = max(peaks.values())
    print(
        f"| {arguments.shape} | tokens/s | of the best peak | peak memory |"
        + "".join(f" x {n} |" for n in rates if "HF" in n)
    )
    print("|---|---|---|---|" + "---|" * sum("HF" in n for n in rates))
    for name, rate in rates.items():
        ratios = "".join(f" {rate / rates[other]:.2f} |" for other in rates if "HF" in other)
        memory = contestants[name].memory / 2**30
        print(f"| {name} | {rate:,.0f} | {rate * flops / best:.0%} | {memory:.2f} GiB |{ratios}")


if __name__ == "__main__":
    main()
