"""Training speed and memory beside Hugging Face transformers, interleaved on this machine.

Each contestant is a process of its own that trains one step when asked, so that steps of all contestants alternate and
peak memory is each one's own. Prints a Markdown table of medians. Needs the `bench` extra.

    python benchmarks/training.py --shape small --rounds 5
    python benchmarks/training.py --shape medium --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from contestants import Contestant, Step, answer, anychip_step, set_threads, take_turns, transformers_step


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


def hf_step(shape: Shape, dtype_name: str, compiled: bool) -> Step:
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
    return transformers_step(LlamaForCausalLM(config), shape.batch, shape.seq, dtype_name, compiled)


def work(name: str, shape: Shape) -> None:
    set_threads()
    kind, dtype_name, compiled = CONTESTANTS[name]
    if kind == "anychip":
        answer(anychip_step(model_config(shape), shape.batch, shape.seq, dtype_name, compiled))
    else:
        answer(hf_step(shape, dtype_name, compiled))


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
    contestants = {name: Contestant("--worker", name, "--shape", arguments.shape) for name in arguments.only}
    take_turns(contestants.values(), arguments.rounds, warm_up=1)
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
