"""What attestation costs a training: CPU and wall seconds inside the witness, beside those of the whole training.

The witness is called where it always is; each of its calls is timed. The start (pinning code, environment, data and
chips) is shown apart, since it is paid once a start, not once a step. CPU time is that of the calling thread, so that a
loaded machine changes it little.

    python benchmarks/attest.py --recipe recipes/demo.yaml --steps 60
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAR = 0.005
START = ("begin", "restored")
EVERY = (*START, "stepped", "claim", "settle")


def timed(name: str, real: Callable[..., Any], cpu: dict[str, float], wall: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        cpu_started, wall_started = time.thread_time(), time.perf_counter()
        try:
            return real(*arguments)
        finally:
            cpu[name] += time.thread_time() - cpu_started
            wall[name] += time.perf_counter() - wall_started

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-interval", type=int, default=20)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    given = parser.parse_args()

    from anychip.attest.witness import ChainWitness
    from anychip.stages import open_run, run_stage
    from anychip.train import loop

    overrides = [
        "attest.record=true",
        "grow=[]",
        f"training.steps={given.steps}",
        f"checkpoint.save_interval={given.save_interval}",
        "training.eval_interval=0",
        *given.overrides,
    ]
    cpu: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)
    for name in EVERY:
        setattr(ChainWitness, name, timed(name, getattr(ChainWitness, name), cpu, wall))
    loop.train_step = timed("train_step", loop.train_step, cpu, wall)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_run(given.recipe, overrides, Path(folder))
        run_stage("data", *opened)
        cpu_started, wall_started = time.process_time(), time.perf_counter()
        run_stage("train", *opened)
        cpu_total, wall_total = time.process_time() - cpu_started, time.perf_counter() - wall_started
        chain = opened[1].root / "attest"
        size = sum(path.stat().st_size for path in chain.rglob("*") if path.is_file())
    print(f"\n{given.recipe}, {given.steps} steps, a checkpoint every {given.save_interval}\n")
    print("| call | CPU | of training's CPU | wall | of its wall time |\n|---|---|---|---|---|")
    for name in EVERY:
        shares = f"{cpu[name] / cpu_total:.3%} | {wall[name] * 1e3:.1f} ms | {wall[name] / wall_total:.3%}"
        print(f"| {name} | {cpu[name] * 1e3:.1f} ms | {shares} |")
    running = [name for name in EVERY if name not in START]
    cpu_share = sum(cpu[name] for name in running) / cpu["train_step"]
    wall_share = sum(wall[name] for name in running) / wall["train_step"]
    print(f"\nwhile it trains: {cpu_share:.3%} of the CPU time of its steps, {wall_share:.3%} of their wall time "
          f"(bar {BAR:.1%}); {size / 1e3:.0f} kB on disk")  # fmt: skip


if __name__ == "__main__":
    main()
