"""Serving 1, 8 and 32 clients at once, beside Hugging Face `generate` and one-at-a-time serving, on this machine.

Every client asks over HTTP for a stream of the same number of tokens, each with its own prompt, greedily, from a server
in a process of its own with a random 12 x 768 model. Hugging Face continues the same prompts as one batch with a static
cache; one-at-a-time is our own server with a batch of one. Rounds are interleaved; medians are printed.

    python benchmarks/serve.py [--rounds 3] [--tokens 64] [--threads 2] [--weights bf16] [--json FILE]

Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from decode import SHAPE

PROMPT_TOKENS = 32
CLIENTS = (1, 8, 32)
BARS = {1: 1.5, 8: 2.0}


def prompt(client: int, round_: int) -> list[int]:
    return [20 + (31 * i * i + 7 * i + 977 * client + 131 * round_) % 30_000 for i in range(PROMPT_TOKENS)]


def _random_decoder(threads: int) -> Any:
    import torch

    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import ModelConfig

    torch.set_num_threads(threads)
    config = ModelConfig.model_validate(SHAPE)
    decoder = Decoder(config)
    init_parameters(decoder, config, seed=0)
    return decoder


def serve(max_batch: int, weights: str, threads: int) -> None:
    """The server process: a random model, and a tokenizer that only has to decode."""
    from anychip.data.tokenizer import train_bpe
    from anychip.recipe.schema import SamplingConfig
    from anychip.serve.api.keys import Keys
    from anychip.serve.api.server import run_server
    from anychip.serve.api.service import Service
    from anychip.serve.talker import make_talker
    from anychip.serve.worker import EngineThread

    thread = EngineThread()
    decoder = thread.begin(partial(_random_decoder, threads)).result()
    tokenizer = train_bpe(["the cat sat on the mat"], vocab_size=280)
    # A random model answers with any of its 32,000 tokens: each is a letter, so that every one is sent at once.
    tokenizer.decode = lambda ids, skip_special=True: "".join(chr(97 + index % 26) for index in ids)  # type: ignore

    @dataclass(frozen=True)
    class Loaded:
        decoder: Any
        tokenizer: Any
        sampling: Any

    loaded = Loaded(decoder, tokenizer, SamplingConfig())
    talker = thread.begin(lambda: make_talker(loaded, {}, weights, max_batch=max_batch)).result()  # type: ignore
    service = Service(talker, "model", thread=thread)
    run_server(service, Keys([]), host="127.0.0.1", port=0, hosts=(), origins=(), drain_seconds=0)


def start(max_batch: int, weights: str, threads: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, __file__, "--serve", str(max_batch), "--weights", weights, "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


async def ask_all(url: str, clients: int, round_: int, new_tokens: int) -> tuple[float, list[float]]:
    """Tokens/s of all clients together, and each one's seconds to its first token."""
    host, port = url.removeprefix("http://").split(":")

    async def ask(client: int) -> tuple[float, int]:
        """By plain sockets: what a library for clients takes would be taken from the server here."""
        body = {
            "prompt": prompt(client, round_),
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "logprobs": 0,
            "logit_bias": {str(token): -100 for token in range(7)},
        }
        text = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        assert b" 200 " in await reader.readline()
        first, tokens = 0.0, 0
        while (line := await reader.readline()) != b"data: [DONE]\n":
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                found = json.loads(line[6:])["choices"][0]["logprobs"]
                tokens += len(found["tokens"]) if found else 0
        writer.close()
        return first, tokens

    started = time.perf_counter()
    found = await asyncio.gather(*(ask(client) for client in range(clients)))
    seconds = time.perf_counter() - started
    assert sum(tokens for _, tokens in found) == clients * new_tokens
    return clients * new_tokens / seconds, [first for first, _ in found]


def hugging_face(dtype_name: str, new_tokens: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype_name)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def decode(clients: int, round_: int) -> float:
        ids = torch.tensor([prompt(client, round_) for client in range(clients)])
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        assert out.shape[1] == PROMPT_TOKENS + new_tokens
        return clients * new_tokens / (time.perf_counter() - started)

    return decode


def measure(rounds: int, weights: str, threads: int, new_tokens: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    peer = hugging_face("float32" if weights == "fp32" else "bfloat16", new_tokens)
    batched, url = start(max(CLIENTS), weights, threads)
    single, single_url = start(1, weights, threads)
    results: dict[str, Any] = {"ours": {}, "one at a time": {}, "HF": {}, "first": {}}
    try:
        for clients in CLIENTS:
            asyncio.run(ask_all(url, clients, 99, new_tokens))  # warm up
            peer(clients, 99)
        for round_ in range(rounds):
            for clients in CLIENTS:
                speed, first = asyncio.run(ask_all(url, clients, round_, new_tokens))
                results["ours"].setdefault(clients, []).append(speed)
                results["first"].setdefault(clients, []).append(max(first))
                results["HF"].setdefault(clients, []).append(peer(clients, round_))
            # 8 clients are enough to fill a server of one, and the rest would only wait.
            speed, _ = asyncio.run(ask_all(single_url, 8, round_, new_tokens))
            results["one at a time"].setdefault(max(CLIENTS), []).append(speed)
    finally:
        for process in (batched, single):
            process.terminate()
            process.wait()
    return results


def table(results: dict[str, Any]) -> str:
    lines = [
        "| clients | tokens/s | HF generate | x HF | x one at a time | last first token, s | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = statistics.median(results["one at a time"][max(CLIENTS)])
    for clients in CLIENTS:
        ours = statistics.median(results["ours"][clients])
        pairs = zip(results["ours"][clients], results["HF"][clients], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        bar = f"{BARS[clients]} x HF" if clients in BARS else "3 x one at a time"
        first = statistics.median(results["first"][clients])
        theirs = statistics.median(results["HF"][clients])
        lines.append(
            f"| {clients} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} | {ours / alone:.2f} | {first:.2f} | {bar} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", default="bf16", choices=("bf16", "fp32", "int8"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.weights, arguments.threads)
        return
    results = measure(arguments.rounds, arguments.weights, arguments.threads, arguments.tokens)
    print(f"\n{arguments.weights}, {arguments.threads} threads, load average at the end {os.getloadavg()[0]:.1f}.\n")
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
