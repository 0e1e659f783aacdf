"""What it costs that nothing on disk can lie: hashing beside saving and training, and copies in memory beside a step.

Parts, each a Markdown table of medians: digests that one could use; a save with and without hashing (interleaved; the
hash is computed by a thread beside writing and flushing); the blocks of a corpus that a batch reads for the first time;
copies of the state in the host's memory. On a busy machine trust the CPU seconds and the ratios.

    python benchmarks/integrity.py [--shape small] [--gigabytes 0.25] [--rounds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from contestants import anychip_step
from training import SHAPES, Shape, model_config

BARS = {"save": 0.10, "training": 0.01, "copies": 0.01}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds; CPU seconds are of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def medians(rows: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(wall for wall, _ in rows), statistics.median(cpu for _, cpu in rows)


class NoHash:
    """What hashlib gives, without the work."""

    def __init__(self, data: bytes = b"") -> None: ...

    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


def digests(rounds: int) -> float:
    """Table of digests; returns the CPU seconds of SHA-256 for a gigabyte."""
    data = os.urandom(64 << 20)
    print("| digest | GB a CPU second |\n|---|---|")
    speeds = {}
    works: dict[str, Callable[[], object]] = {
        name: partial(hashlib.new, name, data) for name in ("sha256", "sha1", "blake2b", "sha512")
    }
    works["crc32 (no match for malice)"] = partial(zlib.crc32, data)
    for name, work in works.items():
        speeds[name] = len(data) / 1e9 / min(timed(work)[1] for _ in range(rounds))
        print(f"| {name} | {speeds[name]:.2f} |")
    return 1 / speeds["sha256"]


def saving(gigabytes: float, rounds: int, folder: Path, hash_seconds: float) -> None:
    import torch

    from anychip.train.checkpoint import CheckpointStore, shard

    state = {f"model.{n}": torch.randn(1 << 20) for n in range(max(1, round(gigabytes * 1e9 / (4 << 20))))}
    size = sum(tensor.nbytes for tensor in state.values()) / 1e9
    rows: dict[str, list[tuple[float, float]]] = {"hashed": [], "not hashed": []}
    for number in range(rounds):
        for kind, taken in rows.items():
            store = CheckpointStore(folder / f"{kind}-{number}".replace(" ", "-"))
            fake = mock.Mock(sha256=NoHash) if kind == "not hashed" else hashlib
            with mock.patch.object(shard, "hashlib", fake):
                taken.append(timed(partial(store.save, 1, state, {})))
        for entry in folder.iterdir():
            shutil.rmtree(entry)
    (wall, cpu), (bare, bare_cpu) = medians(rows["hashed"]), medians(rows["not hashed"])
    print(f"\nA save of {size:.2f} GB, {rounds} rounds\n\n| | seconds | CPU seconds |\n|---|---|---|")
    print(f"| hashed | {wall:.2f} | {cpu:.2f} |\n| not hashed | {bare:.2f} | {bare_cpu:.2f} |")
    pairs = zip(rows["hashed"], rows["not hashed"], strict=True)
    share = statistics.median(1 - without[0] / with_hash[0] for with_hash, without in pairs)
    print(f"\nHashing: {share:.1%} of the time of a save (bar {BARS['save']:.0%}); ", end="")
    print(f"{size * hash_seconds:.2f} CPU seconds beside writing. Training waits for none of it in the background.")


def reading(shape: Shape, step_seconds: float, rounds: int, folder: Path) -> None:
    """Batches of samples that each lie in blocks of their own: the most that verification can cost."""
    import numpy as np

    from anychip.data.corpora import Corpus
    from anychip.data.indexed import IndexedWriter, bin_path, idx_path
    from anychip.data.integrity import BLOCK_BYTES, blocks_path, write_blocks
    from anychip.files import sha256_file

    prefix, tokens = folder / "corpus", np.random.default_rng(0).integers(0, shape.vocab, BLOCK_BYTES // 2)
    with IndexedWriter(prefix, "<u2") as writer:
        for _ in range(shape.batch * rounds * 2):
            writer.add(tokens)
    held = {
        "idx_sha256": sha256_file(idx_path(prefix)),
        "blocks_sha256": write_blocks(bin_path(prefix), blocks_path(prefix)),
    }
    taken = []
    for _ in range(rounds):
        verified, plain = Corpus("c", prefix, held=held), Corpus("c", prefix)

        def batch(corpus: Corpus) -> None:
            for sample in range(shape.batch):
                start = 2 * sample * len(tokens) + 7
                corpus.tokens(start, start + shape.seq)

        taken.append(timed(partial(batch, verified))[1] - timed(partial(batch, plain))[1])
    cost = statistics.median(taken)
    blocks = f"{shape.batch} samples, each in a block of {BLOCK_BYTES >> 10} KiB of its own, read for the first time"
    print(f"\n{blocks}: {cost * 1e3:.2f} ms, {cost / step_seconds:.3%} of a step (bar {BARS['training']:.0%})")


def copies(shape: Shape, step_seconds: float, rounds: int) -> None:
    import torch

    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import OptimizerConfig
    from anychip.train.checkpoint import CheckpointStore
    from anychip.train.optimizer import Optimizer

    config = model_config(shape)
    model = Decoder(config)
    init_parameters(model, config, 0)
    parameters = dict(model.named_parameters())
    state = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    optimizer = Optimizer(parameters, OptimizerConfig(), torch.float32).state()
    state |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
    stalls, work = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        store = CheckpointStore(Path(folder), keep=2)
        store.prepare(state)
        for step in range(rounds + 1):
            before = time.process_time()
            stalls.append(timed(partial(store.save_async, step, state, {}))[0])
            store.wait()
            work.append(time.process_time() - before)
    stall, cpu = statistics.median(stalls[1:]), statistics.median(work[1:])
    size, cores = sum(tensor.nbytes for tensor in state.values()) / 1e9, os.cpu_count() or 1
    print(f"\nCopies in memory of {size:.2f} GB: training stands still {stall:.3f} s; {cpu:.2f} CPU seconds in all")
    print(f"\n| a copy every | stall (bar {BARS['copies']:.0%}) | its CPU time, where training uses all cores |")
    print("|---|---|---|")
    for interval in (1, 10, 25, 50, 100):
        a_step = interval * step_seconds
        print(f"| {interval} steps | {stall / a_step:.2%} | {cpu / cores / a_step:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--gigabytes", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="disk to measure; default: the temporary folder")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    shape = SHAPES[arguments.shape]
    step = anychip_step(model_config(shape), shape.batch, shape.seq, "fp32", False)
    step()
    steps = [timed(step) for _ in range(2)]
    step_seconds = min(min(wall for wall, _ in steps), min(cpu for _, cpu in steps) / (os.cpu_count() or 1))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; a step of {arguments.shape}: {step_seconds:.2f} s\n")
    hash_seconds = digests(arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saving(arguments.gigabytes, arguments.rounds, Path(folder), hash_seconds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        reading(shape, step_seconds, arguments.rounds, Path(folder))
    copies(shape, step_seconds, arguments.rounds)


if __name__ == "__main__":
    main()
