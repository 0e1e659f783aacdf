"""What tracing costs: a training step as it is, one with a recorder that does not trace it, and a traced one.

Prints medians, and the share of the time that tracing every INTERVAL steps takes. The three alternate, on one model:
what is not traced leaves nothing behind in it (tests/verify). Run it on an idle machine, or with --busy, which takes
one thread and its CPU time.

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
from one_step import prepare
from training import SHAPES, Shape


def build(shape: Shape, dtype_name: str, path: Path) -> dict[str, Callable[[], None]]:
    """Steps of one micro-batch, by what looks on."""
    from anychip.train.observe import Observer
    from anychip.train.step import Checks
    from anychip.verify.record import Recorder

    parts = prepare("trace", shape, dtype_name)
    recorder = Recorder(path, 2, {}, 1 << 40)  # the first step of all is traced too, and warms up
    recorder.attach(parts.job, parts.engine, parts.processes)

    def step(observer: Observer, number: int) -> None:
        observer.begin(number, 1e-4)
        parts.step(1e-4, Checks(), observer)

    return {
        "as it is": lambda: step(Observer(), 1),
        "recorder idle": lambda: step(recorder, 1),
        "traced": lambda: step(recorder, 2),
    }


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
        works = build(shape, options.dtype, path)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds + 1):  # the first round warms up
            for name, work in works.items():
                started = clock()
                work()
                seconds[name].append(clock() - started)
        bytes_a_step = path.stat().st_size / (options.rounds + 2)
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
