"""What tracing costs: a training step as it is, one with a recorder that does not trace it, and a traced one.

Prints medians, and the share of the time that tracing every INTERVAL steps takes. The three alternate. Run it on an
idle machine, or with --busy, which takes one thread and its CPU time.

    python benchmarks/trace.py --interval 100
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from training import SHAPES, Shape, model_config


def build(shape: Shape, dtype_name: str, recorder_path: Path | None) -> Callable[[bool], None]:
    """A step of one micro-batch; with a path, one that a recorder sees, traced or not."""
    from anychip.chips.backend import detect_backend
    from anychip.data.batch import Batch
    from anychip.model.init import init_tensor
    from anychip.parallel.layout import Layout
    from anychip.parallel.processes import Processes
    from anychip.recipe.schema import CheckpointConfig, GuardConfig, LogConfig, OptimizerConfig, ParallelConfig
    from anychip.train.engine import Engine
    from anychip.train.guard import Guard
    from anychip.train.heartbeat import Heartbeat
    from anychip.train.job import TrainingJob
    from anychip.train.observe import Observer
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.step import Checks, train_step
    from anychip.verify.record import Recorder

    backend = detect_backend()
    dtype, config = compute_dtype(dtype_name, backend), model_config(shape)
    job = TrainingJob(
        title="trace",
        directory=Path(),
        model=config,
        source=None,
        initialize=lambda parameters: None,
        evaluate=None,
        identity="",
        steps=1,
        seq_length=shape.seq,
        micro_batch_size=shape.batch,
        global_batch_size=shape.batch,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
    )
    processes = Processes(job.parallel, Layout(), 0, backend.device(0))
    engine = Engine(job, processes, dtype)
    for name, parameter in engine.parameters.items():
        parameter.detach().copy_(init_tensor(name, parameter.shape, config, 0))
    optimizer = Optimizer(engine.parameters, job.optimizer, dtype)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    guard, silent = Guard(GuardConfig()), Heartbeat(None, 0)
    observer = Observer() if recorder_path is None else Recorder(recorder_path, 1 << 40, {}, 1 << 40)
    observer.attach(job, engine, processes)

    def step(traced: bool) -> None:
        observer.begin(1 if traced else 2, 1e-4)
        train_step(engine, optimizer, processes, batch, 1e-4, 1.0, guard, silent, Checks(), observer)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--interval", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="other programs run: one thread, CPU time")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)

    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        plain, recorded = build(shape, options.dtype, None), build(shape, options.dtype, path)
        works = {
            "as it is": lambda: plain(False),
            "recorder idle": lambda: recorded(False),
            "traced": lambda: recorded(True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds + 1):  # the first round warms up
            for name, work in works.items():
                started = clock()
                work()
                seconds[name].append(clock() - started)
        bytes_a_step = path.stat().st_size / (options.rounds + 1)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    base = median["as it is"]
    print(f"{options.shape}, {options.rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| step | seconds | over the plain one |\n|---|---|---|")
    for name, value in median.items():
        print(f"| {name} | {value:.3f} | {value / base - 1:+.1%} |")
    share = (median["traced"] + (options.interval - 1) * median["recorder idle"]) / options.interval / base - 1
    print(f"\nEvery {options.interval} steps: {share:+.2%}; {bytes_a_step / 1e6:.2f} MB a traced step.")


if __name__ == "__main__":
    main()
