"""Decoding speed, batch 1, beside Hugging Face `generate` with a static cache, interleaved on this machine.

Every round lets each contestant continue the same prompt by the same number of tokens, greedily, and reads a large
array for the bandwidth of memory: decoding reads every weight once a token, so weight bytes a token over bandwidth is
the speed that no decoder passes. Prints a Markdown table of medians. Needs the `bench` extra.

    python benchmarks/decode.py [--rounds 7] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 32
NEW_TOKENS = 64
BAR = 1.5
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
Decode = Callable[[], float]  # continues the prompt, returns tokens/s


def hugging_face(dtype_name: str, prompt: list[int], compiled: bool) -> Decode:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, dtype_name)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if compiled:
        model.forward = torch.compile(model.forward)
    ids = torch.tensor([prompt])

    def decode() -> float:
        started = time.perf_counter()
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")
        assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
        return NEW_TOKENS / (time.perf_counter() - started)

    return decode


def anychip(dtype_name: str, prompt: list[int]) -> Decode:
    import torch

    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import ModelConfig, SamplingConfig
    from anychip.serve.engine import Engine, Request
    from anychip.serve.inference import InferenceModel

    config = ModelConfig.model_validate(SHAPE)
    decoder = Decoder(config)
    init_parameters(decoder, config, seed=0)
    engine = Engine(InferenceModel(decoder, getattr(torch, dtype_name), release=True))
    request = Request("decode", prompt, SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS))

    def decode() -> float:
        started = time.perf_counter()
        count = sum(event.token is not None for event in engine.stream(request))
        assert count == NEW_TOKENS
        return NEW_TOKENS / (time.perf_counter() - started)

    return decode


def weight_bytes(bytes_each: int) -> int:
    """Bytes of the matrices that one token multiplies: all but the embedding."""
    from anychip.model.arithmetic import parameter_shapes
    from anychip.recipe.schema import ModelConfig

    shapes = parameter_shapes(ModelConfig.model_validate(SHAPE))
    return bytes_each * sum(
        shape[0] * shape[1] for name, shape in shapes if len(shape) == 2 and name != "embed_tokens.weight"
    )


def read_bandwidth() -> Decode:
    """Bytes/s of summing 512 MiB of fp32."""
    import torch

    array = torch.ones(128 << 20)

    def read() -> float:
        started = time.perf_counter()
        array.sum()
        return array.nbytes / (time.perf_counter() - started)

    return read


def measure(rounds: int, compiled_peer: bool) -> dict[str, list[float]]:
    prompt = [(31 * i * i + 7 * i + 11) % SHAPE["vocab_size"] for i in range(PROMPT_TOKENS)]
    contestants: dict[str, Decode] = {"memory": read_bandwidth()}
    for name in ("bfloat16", "float32"):
        contestants[f"anychip {name}"] = anychip(name, prompt)
        contestants[f"HF {name}"] = hugging_face(name, prompt, compiled=False)
        if compiled_peer:
            contestants[f"HF {name}, compiled"] = hugging_face(name, prompt, compiled=True)
    for decode in contestants.values():  # warm up; a compiled contestant compiles here
        decode()
        decode()
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, decode in contestants.items():
            results[name].append(decode())
    return results


def table(results: dict[str, list[float]]) -> str:
    bandwidth = statistics.median(results["memory"])
    lines = [
        f"Memory is read at {bandwidth / 1e9:.1f} GB/s (median).",
        "",
        "| contestant | tokens/s (median) | best | x HF | weights read, GB/s | share of memory bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for name, speeds in results.items():
        if name == "memory":
            continue
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        speed = statistics.median(speeds)
        ratio = statistics.median(
            ours / theirs for ours, theirs in zip(speeds, results[f"HF {dtype}"], strict=True)
        )  # of the same round
        rate = speed * weight_bytes(2 if dtype == "bfloat16" else 4)
        lines.append(
            f"| {name} | {speed:.1f} | {max(speeds):.1f} | {ratio:.2f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled-peer", action="store_true", help="also measure HF with torch.compile (minutes)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    results = measure(arguments.rounds, arguments.compiled_peer)
    print(f"\n{arguments.threads} threads, load average at the end {os.getloadavg()[0]:.1f}.", end=" ")
    print(table(results))
    if arguments.json:
        record: dict[str, Any] = {"shape": SHAPE, "threads": arguments.threads, "results": results}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
