"""Tokenizing and packing beside raw `tokenizers` batch encoding, and reading back; interleaved on this machine.

Packing reads JSON lines, encodes, and writes Megatron .bin/.idx with counts and digests, with one process per core. The
peer is `encode_batch_fast` on the same texts already in memory, its threads on all cores, writing nothing.

    anychip data prepare recipes/demo.yaml
    python benchmarks/tokenize_pack.py runs/demo --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import orjson
from tokenizers import Tokenizer

from anychip.data.loader import TrainingData
from anychip.data.pack import pack_corpus
from anychip.data.prepare import document_files
from anychip.rundir import RunDirectory

READ_STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run)
    recipe = run.read_recipe()
    files = document_files(run, recipe.data.sources[0], "train")
    texts = [orjson.loads(line)["text"] for path in files for line in path.read_bytes().splitlines()]
    raw = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    raw.encode_special_tokens = True
    ours, theirs = [], []
    for number in range(arguments.rounds):
        started = time.perf_counter()
        encoded = raw.encode_batch_fast(texts, add_special_tokens=False)
        tokens = sum(len(encoding) for encoding in encoded)
        theirs.append(tokens / (time.perf_counter() - started))
        del encoded
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            counts = pack_corpus(files, Path(folder) / f"round{number}", run.tokenizer, os.cpu_count() or 1)
            ours.append(counts.tokens / (time.perf_counter() - started))
    data = TrainingData(run, recipe)
    started = time.perf_counter()
    read = sum(data.batch(step).input_ids.numel() for step in range(READ_STEPS))
    reading = read / (time.perf_counter() - started)
    packing, encoding_rate = statistics.median(ours), statistics.median(theirs)
    print("| | tokens/s | x raw encoding |\n|---|---|---|")
    print(f"| raw `tokenizers` batch encoding | {encoding_rate:,.0f} | 1.00 |")
    print(f"| anychip tokenize + pack | {packing:,.0f} | {packing / encoding_rate:.2f} |")
    print(f"| reading batches back | {reading:,.0f} | |")


if __name__ == "__main__":
    main()
