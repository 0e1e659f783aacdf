"""Tokenizing and packing beside raw `tokenizers` batch encoding, and reading back; interleaved on this machine.

Packing starts its processes, reads JSON lines, encodes, and writes Megatron .bin/.idx with names, counts and digests,
flushed to disk. The peers encode the same texts, already in memory, with their threads on all cores, and write nothing:
`encode_batch`, and `encode_batch_fast`, which leaves out offsets. Prints a Markdown table of medians.

    anychip data prepare recipes/demo.yaml
    python benchmarks/tokenize_pack.py runs/demo [--rounds 5] [--training-speed TOKENS_PER_SECOND]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from tokenizers import Tokenizer

from anychip.data.loader import TrainingData
from anychip.data.pack import pack_corpus
from anychip.data.prepare import document_files
from anychip.rundir import RunDirectory

READ_STEPS = 400
PACK_BAR, READ_BAR = 0.9, 50.0


def tokens_per_second(work: Callable[[], int]) -> float:
    """Speed of work that returns how many tokens it made."""
    started = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run whose data is prepared with a tokenizer.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training-speed", type=float, default=4000.0, help="tokens/s that reading is compared with")
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run)
    recipe = run.read_recipe()
    files = document_files(run, recipe.data.sources[0], "train")
    texts = [orjson.loads(line)["text"] for path in files for line in path.read_bytes().splitlines()]
    raw = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    raw.encode_special_tokens = True
    data = TrainingData(run, recipe)
    data.batch(0)  # imports torch

    def pack() -> int:
        with tempfile.TemporaryDirectory() as folder:
            return pack_corpus(files, Path(folder) / "packed", run.tokenizer, os.cpu_count() or 1).tokens

    contestants: dict[str, Callable[[], int]] = {
        "`tokenizers` encode_batch": lambda: sum(map(len, raw.encode_batch(texts, add_special_tokens=False))),
        "`tokenizers` encode_batch_fast": lambda: sum(map(len, raw.encode_batch_fast(texts, add_special_tokens=False))),
        "anychip tokenize + pack": pack,
        "anychip reading batches": lambda: sum(data.batch(step).labels.numel() for step in range(READ_STEPS)),
    }
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, work in contestants.items():
            results[name].append(tokens_per_second(work))
    median = {name: statistics.median(values) for name, values in results.items()}
    peer = median["`tokenizers` encode_batch"]
    print(f"{sum(map(len, texts)) / 1e6:.1f} M characters, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | tokens/s | x encode_batch | x training |\n|---|---|---|---|")
    for name, speed in median.items():
        print(f"| {name} | {speed:,.0f} | {speed / peer:.2f} | {speed / arguments.training_speed:,.0f} |")
    print(f"\nBars: packing {PACK_BAR} x encode_batch, reading {READ_BAR:.0f} x training.")


if __name__ == "__main__":
    main()
