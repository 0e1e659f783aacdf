"""Two processes of one thread beside one process of two threads: what splitting costs, dimension by dimension.

12 layers x 768, vocabulary 32000, the same global batch of 8 x 512 tokens a step. Steps of all contestants alternate;
prints a Markdown table of medians. On a CPU without bf16 units add `--dtype fp32`.

    python benchmarks/layouts.py --rounds 3 --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONTESTANTS: dict[str, tuple[dict[str, object], int]] = {
    "one process": ({}, 4),
    "data (FSDP2)": ({"data_parallel_shard": 2}, 4),
    "data (copies)": ({"data_parallel_replicate": 2}, 4),
    "tensor": ({"tensor_parallel": 2}, 4),
    "pipeline, 1f1b": ({"pipeline_parallel": 2, "pipeline_layers": [7, 5]}, 1),  # the last stage also has the head
    "pipeline, 1f1b, even": ({"pipeline_parallel": 2}, 1),
    "pipeline, zero_bubble": ({"pipeline_parallel": 2, "pipeline_schedule": "zero_bubble"}, 1),
    "context, ring": ({"context_parallel": 2}, 4),
}
GLOBAL_BATCH, SEQ_LENGTH = 8, 512


def work(name: str, dtype_name: str) -> None:
    """Train one step for each line read; rank 0 answers with its seconds."""
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.data.batch import Batch
    from anychip.parallel.parts import initialize_parts
    from anychip.parallel.processes import Processes
    from anychip.recipe.schema import CheckpointConfig, LogConfig, ModelConfig, OptimizerConfig, ParallelConfig
    from anychip.train.engine import Engine
    from anychip.train.guard import Guard
    from anychip.train.heartbeat import Heartbeat
    from anychip.train.job import TrainingJob
    from anychip.train.optimizer import Optimizer
    from anychip.train.step import train_step

    parallel, micro_batch = CONTESTANTS[name]
    torch.set_num_threads(1 if parallel else 2)
    backend = detect_backend()
    backend.prepare_process()
    model = ModelConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    tokens = torch.randint(0, 32_000, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])

    class Same:
        def batch(self, step: int) -> Batch:
            return batch

    job = TrainingJob(
        title="benchmark",
        directory=Path(),
        model=model,
        source=Same(),
        initialize=lambda parameters: None,
        evaluate=None,
        identity="",
        steps=1,
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch,
        global_batch_size=GLOBAL_BATCH,
        parallel=ParallelConfig.model_validate(parallel),
        optimizer=OptimizerConfig(),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    processes = Processes.join(job.parallel, torch.device("cpu"), "gloo")
    engine = Engine(job, processes, dtype)
    initialize_parts(engine.parameters, model, 0)
    optimizer = Optimizer(engine.parameters, job.optimizer, dtype)
    guard, silent = Guard(job.guard), Heartbeat(None, processes.rank)
    for _ in sys.stdin:
        started = time.perf_counter()
        train_step(engine, optimizer, processes, batch, 3e-4, 1.0, guard, silent)
        processes.barrier()
        if processes.is_first:
            print(json.dumps(time.perf_counter() - started), flush=True)


class Contestant:
    def __init__(self, name: str, dtype: str) -> None:
        size = 2 if CONTESTANTS[name][0] else 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, __file__, "--worker", name, "--dtype", dtype]
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        common |= {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": str(3 - size)}
        self.ranks = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]
        self.seconds: list[float] = []

    def step(self, keep: bool) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            print("step", file=rank.stdin, flush=True)
        assert self.ranks[0].stdout is not None
        seconds = json.loads(self.ranks[0].stdout.readline())
        if keep:
            self.seconds.append(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--worker", choices=CONTESTANTS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.dtype)
        return
    contestants = {name: Contestant(name, arguments.dtype) for name in arguments.only}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for contestant in contestants.values():
            contestant.step(keep=number > 0)
    rates = {n: GLOBAL_BATCH * SEQ_LENGTH / statistics.median(c.seconds) for n, c in contestants.items()}
    print(f"| 12 x 768, {arguments.dtype} | tokens/s | of one process |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates['one process']:.0%} |")


if __name__ == "__main__":
    main()
