"""The planner on this machine: what it predicts of a training step, from `anychip bench chip`, beside what is measured.

Three sizes of models, one process with all threads and two processes with half of them each (copies of the model),
without recomputation. Measures the machine first, then the steps, and prints a Markdown table.

    python benchmarks/plan_cpu.py --steps 5
    python benchmarks/plan_cpu.py --steps 5 --dtype bf16
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

# layers, hidden, ffn, heads, key-value heads, vocabulary, rows of a micro-batch, rows of a step
SIZES = {
    "4 x 256": (4, 256, 768, 4, 2, 4096, 4, 16),
    "8 x 384": (8, 384, 1024, 8, 4, 8192, 4, 8),
    "12 x 768": (12, 768, 2048, 12, 4, 32_000, 2, 4),
}
SEQ_LENGTH = 512


def model_of(size: str):
    from anychip.recipe.schema import ModelConfig

    layers, hidden, ffn, heads, kv_heads, vocab, _, _ = SIZES[size]
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def work(size: str, steps: int, dtype: str) -> None:
    """Train in this process's place; rank 0 prints the median seconds of a step."""
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators import operators_for
    from anychip.data.batch import Batch
    from anychip.parallel.parts import initialize_parts
    from anychip.parallel.processes import Processes
    from anychip.recipe.schema import CheckpointConfig, LogConfig, OptimizerConfig, ParallelConfig
    from anychip.train.engine import Engine
    from anychip.train.guard import Guard
    from anychip.train.heartbeat import Heartbeat
    from anychip.train.job import TrainingJob
    from anychip.train.optimizer import Optimizer
    from anychip.train.step import train_step

    model, (*_, micro, rows) = model_of(size), SIZES[size]
    detect_backend().prepare_process()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokens = torch.randint(0, model.vocab_size, (rows, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    job = TrainingJob(
        title="benchmark", directory=Path(), model=model, source=None, initialize=lambda parameters: None,
        evaluate=None, identity="", steps=1, seq_length=SEQ_LENGTH, micro_batch_size=micro, global_batch_size=rows,
        recompute="none",
        parallel=ParallelConfig(), optimizer=OptimizerConfig(), checkpoint=CheckpointConfig(), log=LogConfig(),
    )  # fmt: skip
    processes = Processes.join(job.parallel, torch.device("cpu"), "gloo")
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    engine = Engine(job, processes, compute, operators_for("cpu"))
    initialize_parts(engine.parameters, model, 0)
    optimizer = Optimizer(engine.parameters, job.optimizer, compute)
    guard, silent = Guard(job.guard), Heartbeat(None, processes.rank)
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        train_step(engine, optimizer, processes, batch, 3e-4, 1.0, guard, silent)
        processes.barrier()
        seconds.append(time.perf_counter() - started)
    if processes.is_first:
        print(json.dumps(statistics.median(seconds[2:])))


def measure(size: str, processes: int, steps: int, dtype: str) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
              "GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": threads}  # fmt: skip
    command = [sys.executable, __file__, "--worker", size, "--steps", str(steps), "--dtype", dtype]
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    answers = [rank.communicate(timeout=600)[0] for rank in ranks]
    return float(json.loads(answers[0]))


def predict(size: str, processes: int, bench: dict[str, object], dtype: str) -> float:
    from anychip.plan.local import machine_of_bench, memory_here, site_of_bench
    from anychip.plan.predict import predict as predicted
    from anychip.plan.sites import trained_here
    from anychip.plan.types import Layout, Workload

    layers, hidden, ffn, heads, kv_heads, vocab, micro, rows = SIZES[size]
    workload = Workload(
        size, layers, hidden, ffn, heads, kv_heads, hidden // heads, vocab, SEQ_LENGTH, rows, dtype=dtype,
        biases="telechat2", loss_chunk_tokens=1024,
    )  # fmt: skip
    layout = Layout(dp=processes, zero=0, micro_batch=micro)
    machine = machine_of_bench(bench, processes, memory_here())
    site = trained_here(site_of_bench(bench, dtype, processes))
    return predicted(workload, layout, machine, site).step_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--bench", type=Path, help="JSON of `anychip bench chip`; default: measured now")
    parser.add_argument("--worker", choices=SIZES)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.steps, arguments.dtype)
        return
    if arguments.bench:
        bench = json.loads(arguments.bench.read_text())
    else:
        from anychip.chips.bench import measure_chip

        bench = measure_chip()
    print("| model | processes | measured | predicted | error |\n|---|---|---|---|---|")
    for size in SIZES:
        for processes in (1, 2):
            seconds = measure(size, processes, arguments.steps, arguments.dtype)
            expected = predict(size, processes, bench, arguments.dtype)
            print(f"| {size} | {processes} | {seconds:.3f} s | {expected:.3f} s | {expected / seconds - 1:+.0%} |")


if __name__ == "__main__":
    main()
